"""Module 10: workers in processes. The same batches as without, and whatever dies, nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

import tinytorch as t
from tests.modules.test_dataloader import AUGMENT, Drawing, Numbers, noisy_collate, pictures, shown
from tinytorch.m02_tensor_appendix import get_default_dtype
from tinytorch.m10_dataloader_appendix import interrupts_held
from tinytorch.transforms import Compose
from tinytorch.utils.data import DataLoader, Dataset, get_worker_info

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups are POSIX's"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, or uses signals of Linux")
CONTEXTS = ["fork", "forkserver", "spawn"]


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    threads = threading.active_count()
    yield
    assert active_children() == []
    assert threading.active_count() == threads


def started(context: str = "spawn", workers: int = 2, **options: Any) -> DataLoader:
    return DataLoader(**{"num_workers": workers, "multiprocessing_context": context, "seed": 5, **options})


# -- the same batches --------------------------------------------------------------------------------------------------


def add_noise(batch: Any) -> Any:
    return *batch, t.randn(3)


CASES = {
    "augmented pictures": (pictures(23), {"batch_transform": Compose([AUGMENT, add_noise])}),
    "everything that draws": (Drawing(), {"collate_fn": noisy_collate, "batch_transform": add_noise}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("context", "workers"), [("fork", 1), ("fork", 3), ("forkserver", 2), ("spawn", 2)])
def test_batches_are_those_of_a_loader_without_workers(context: str, workers: int, case: str) -> None:
    dataset, options = CASES[case]
    plain = DataLoader(dataset, 5, True, seed=5, **options)
    loader = started(context, workers, dataset=dataset, batch_size=5, shuffle=True, persistent_workers=True, **options)
    t.manual_seed(workers)
    state = t.get_rng_state()
    assert [shown(loader) for _ in range(2)] == [shown(plain) for _ in range(2)]
    assert t.get_rng_state() == state
    for stop in range(len(plain)) if context == "fork" else (1,):
        for each in (plain, loader):
            each.load_state_dict({**plain.state_dict(), "epoch": 7, "batch": stop, "seed": stop})
        assert shown(loader) == shown(plain)
    del loader


def test_streams_and_persistent_processes() -> None:
    plain = DataLoader(Numbers(13), 4, seed=5)
    loader = started(dataset=Numbers(13), batch_size=4, persistent_workers=True)
    first = [shown(loader)]
    (child,) = active_children()
    first.append(shown(loader))
    assert active_children() == [child]
    assert first == [shown(plain), shown(plain)]
    loader.load_state_dict({**plain.state_dict(), "epoch": 0, "batch": 2})
    again = DataLoader(Numbers(13), 4, seed=5)
    again.load_state_dict(loader.state_dict())
    assert shown(loader) == shown(again)
    del loader


class Asking(Dataset):
    """Tells where it was asked."""

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        time.sleep(0.05)
        place = info.id, info.num_workers, info.seed, os.getpid()
        return *place, str(t.zeros(1).dtype), get_default_dtype(), t.zeros(3)[::2], t.tensor(1.5), None

    def __len__(self) -> int:
        return 4


def remember(number: int) -> None:
    os.environ["TINYTORCH_TEST_WORKER"] = str(number)


def recalled(batch: Any) -> Any:
    return os.environ["TINYTORCH_TEST_WORKER"], batch


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_process_knows_what_a_thread_would(context: str) -> None:
    options = {"batch_size": None, "worker_init_fn": remember, "batch_transform": recalled}
    t.set_default_dtype(t.float64)
    try:
        batches = list(started(context, dataset=Asking(), **options))
    finally:
        t.set_default_dtype(t.float32)
    assert {batch[:3] for _, batch in batches} == {(0, 2, 5), (1, 2, 6)}
    for number, batch in batches:
        assert number == str(batch[0])
        assert batch[3] != os.getpid()
        assert batch[4:6] == ("float64", "float64")
        assert (batch[6].tolist(), batch[7].tolist(), batch[8]) == ([0, 0], 1.5, None)
    assert "TINYTORCH_TEST_WORKER" not in os.environ


# -- errors ------------------------------------------------------------------------------------------------------------


class Trouble(Dataset):
    """Example 5 is trouble, of a kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __getitem__(self, index: int) -> int:
        if index == 5:
            getattr(self, self.kind)()
        return index

    def __len__(self) -> int:
        return 12

    def key(self) -> None:
        raise KeyError("five")

    def unicode(self) -> None:
        b"\xff".decode()

    def local(self) -> None:
        class Own(Exception):
            pass

        raise Own("five")

    def unsendable(self) -> None:
        raise ValueError(lambda: None)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def segfault(self) -> None:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest's faulthandler would print
        os.kill(os.getpid(), signal.SIGSEGV)

    def realtime(self) -> None:
        os.kill(os.getpid(), 40)  # one of the signals that have no name

    def leave(self) -> None:
        sys.exit(7)

    def stick(self) -> None:
        time.sleep(60)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("key", KeyError, "KeyError: 'five'"),
        ("unicode", RuntimeError, "UnicodeDecodeError: 'utf-8' codec"),
        ("local", RuntimeError, "Own: five"),
        ("unsendable", ValueError, "<lambda>"),
    ],
)
def test_an_exception_arrives_with_its_traceback(context: str, kind: str, error: type, words: str) -> None:
    iterator = iter(started(context, dataset=Trouble(kind), batch_size=2))
    assert [next(iterator).tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(error) as found:
        next(iterator)
    message = str(found.value)
    assert type(found.value) is error
    assert message.startswith("in DataLoader worker ")
    assert "Traceback (most recent call last):" in message
    assert f"in {kind}\n" in message
    assert words in message
    assert "raised in making batch 2 of epoch 0, of examples [4, 5]" in message


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("kill", "was killed by SIGKILL; perhaps memory ran out: use fewer workers, or threads"),
        ("segfault", "was killed by SIGSEGV"),
        pytest.param("realtime", "was killed by signal 40", marks=LINUX),
        ("leave", "ended with exit status 7"),
    ],
)
def test_a_worker_that_dies_is_an_error_at_once(context: str, kind: str, words: str) -> None:
    iterator = iter(started(context, dataset=Trouble(kind), batch_size=2))
    next(iterator)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^DataLoader: worker [01], process \d+, ") as found:
        list(iterator)
    assert str(found.value).endswith(words)
    assert time.monotonic() - start < 2


def test_a_worker_that_is_killed_from_outside_while_it_waits_is_an_error() -> None:
    loader = started("fork", 1, dataset=pictures(40), batch_size=1, prefetch_factor=1)
    iterator = iter(loader)
    next(iterator)
    (child,) = active_children()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=f"process {child.pid}, was killed by SIGKILL"):
        list(iterator)


def test_after_a_death_the_loader_works_again() -> None:
    loader = started("fork", 1, dataset=pictures(12), batch_size=2, persistent_workers=True)
    expected = [shown(DataLoader(pictures(1), 1)), shown(loader)][1]
    (child,) = active_children()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="SIGKILL"):
        list(loader)
    assert shown(loader) == expected
    del loader


def test_a_timeout_ends_a_worker_that_is_stuck() -> None:
    iterator = iter(started("fork", dataset=Trouble("stick"), batch_size=2, timeout=0.5))
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no batch within the timeout of 0\.5 seconds"):
        list(iterator)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("context", ["forkserver", "spawn"])
def test_what_cannot_be_sent_is_an_error_that_says_what_to_do(context: str) -> None:
    for options in (
        {"collate_fn": lambda examples: examples},
        {"dataset": [threading.Lock()]},
        {"dataset": [sys.stdout]},
    ):
        loader = started(context, **{"dataset": pictures(4), **options})
        with pytest.raises(TypeError, match=r"cannot be sent to a worker process .*leave multiprocessing_context out"):
            list(loader)


def test_a_forked_worker_needs_nothing_sent() -> None:
    assert list(started("fork", dataset=range(4), batch_size=2, collate_fn=lambda x: x)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("context", CONTEXTS)
def test_an_iterator_that_is_abandoned_ends_its_processes(context: str) -> None:
    for batch in started(context, dataset=pictures(40), batch_size=2):
        assert len(active_children()) == 2
        assert batch[1].tolist() == [0, 1]
        break
    assert active_children() == []
    iterator = iter(started(context, dataset=Trouble("stick"), batch_size=2))
    next(iterator)
    start = time.monotonic()
    del iterator
    assert time.monotonic() - start < 2


# -- the end of the main program ---------------------------------------------------------------------------------------

PROGRAM = """
    import os, signal, sys, threading, time
    import tinytorch
    from tinytorch.utils.data import DataLoader, Dataset

    class Slow(Dataset):
        def __getitem__(self, index):
            time.sleep({pause} if index >= 4 else 0)
            return index

        def __len__(self):
            return 1000

    if __name__ == "__main__":
        loader = DataLoader(Slow(), 4, num_workers=2, multiprocessing_context={context!r})
        iterator = iter(loader)
        next(iterator)
        print("running", flush=True)
        {then}
"""


class Program:
    """A program with a loader, in a process group of its own, and all the processes that it has."""

    def __init__(self, folder: Path, context: str | None, then: str, pause: float = 0.001) -> None:
        path = folder / "program.py"
        path.write_text(textwrap.dedent(PROGRAM).format(context=context, then=then, pause=pause))
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "running\n", self.process.communicate()[1]

    def members(self) -> set[int]:
        """The processes of its group, zombies not counted."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == self.process.pid and fields[0] != "Z":
                found.add(int(folder.name))
        return found

    def end(self, timeout: float = 10) -> str:
        """What it wrote to stderr; AssertionError if a process of it lives on after it."""
        _, errors = self.process.communicate(timeout=timeout)
        deadline = time.monotonic() + 3
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left
        return errors


@LINUX
@pytest.mark.parametrize("context", [*CONTEXTS, None])
def test_ctrl_c_ends_everything_and_only_the_main_program_complains(context: str | None, tmp_path: Path) -> None:
    program = Program(tmp_path, context, "list(iterator)", pause=0.05)
    assert len(program.members()) >= (1 if context is None else 3)
    os.killpg(program.process.pid, signal.SIGINT)
    errors = program.end()
    assert program.process.returncode == -signal.SIGINT
    assert errors.count("Traceback (most recent call last)") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "Process " not in errors


def test_interrupts_are_held_while_workers_start() -> None:
    with interrupts_held():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@LINUX
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_ctrl_c_while_workers_start(context: str, tmp_path: Path) -> None:
    then = f"[list(DataLoader(range(4), num_workers=2, multiprocessing_context={context!r})) for _ in range(1000)]"
    for pause in (0.05, 0.15, 0.3):
        for _ in range(3):
            program = Program(tmp_path, context, then)
            time.sleep(pause)
            os.killpg(program.process.pid, signal.SIGINT)
            errors = program.end(timeout=60)
            if "Exception ignored in" not in errors:  # Python drops an interrupt that comes while it collects garbage
                break
        assert errors.count("Traceback (most recent call last)") >= 1
        assert "Process " not in errors
        assert errors.rstrip().endswith("KeyboardInterrupt")


@LINUX
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("pause", [0.001, 30])
def test_workers_end_with_a_main_program_that_is_killed(context: str, pause: float, tmp_path: Path) -> None:
    program = Program(tmp_path, context, "time.sleep(0.2); os.kill(os.getpid(), signal.SIGKILL)", pause)
    assert len(program.members()) >= 3
    program.end()
    assert program.process.returncode == -signal.SIGKILL


@LINUX
@pytest.mark.parametrize("context", [*CONTEXTS, None])
@pytest.mark.parametrize(
    ("then", "pause", "code", "said"),
    [
        ("pass", 0.001, 0, ""),
        ("time.sleep(0.1)", 30, 0, ""),
        ("raise ValueError('over')", 0.001, 1, "ValueError: over"),
        ("kept = [iterator]; kept.append(kept); sys.exit(4)", 0.001, 4, ""),
    ],
)
def test_a_program_ends_although_an_iterator_is_still_there(
    context: str | None, then: str, pause: float, code: int, said: str, tmp_path: Path
) -> None:
    program = Program(tmp_path, context, then, pause)
    start = time.monotonic()
    errors = program.end()
    assert time.monotonic() - start < 5
    assert program.process.returncode == code
    assert errors.strip().endswith(said)
    assert bool(errors) == bool(said)


@LINUX
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_fork_of_the_program_leaves_its_workers_alone(context: str, tmp_path: Path) -> None:
    lines = [
        "time.sleep(0.1)",
        "child = os.fork()",
        "if not child:",
        "    del iterator, loader",
        "    os._exit(3)",
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3",
        "for _ in range(7):",
        "    next(iterator)",
    ]
    program = Program(tmp_path, context, "\n    ".join(lines), pause=0.05)
    errors = program.end()
    assert "Error" not in errors, errors
    assert program.process.returncode == 0


def test_a_program_without_a_guard_is_told_of_it(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(
        "import tinytorch\nfrom tinytorch.utils.data import DataLoader\n"
        "print(list(DataLoader(range(4), num_workers=1, multiprocessing_context='spawn')))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert "a program with worker processes begins under `if __name__ == '__main__':`" in done.stderr
