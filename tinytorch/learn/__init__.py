"""Build it yourself: a learner's workspace, the exercises of each module, what checks them, and grading.

exercises.py   what of a chapter is an exercise, and the chapter without its solutions
workspace.py   the folder that a learner writes in: what lies there, and what has been done
notebooks.py   chapters as notebooks, and back
merging.py     three-way merging by lines, for updates
importing.py   `import tinytorch` inside of it: the learner's files in the place of the chapters
checking.py    the chapter's own tests on a learner's file, exercise by exercise
grading.py     the same for many submissions, each shut in
cli.py         the commands `tinytorch learn …`
"""
