from tests.learn.wrong import Wrong
WRONG_01_10 = ()
