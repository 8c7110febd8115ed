"""A save that is stopped at each of its steps: by a kill, and by Ctrl-C."""

import os
import shutil
import signal
import sys

import pytest
import torch

from tests.encoder.encoders import pair_of

_STEPS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree")


def _writes(event, arguments):
    return event == "os.rename" or (event == "open" and "w" in str(arguments[1]))


def stop_at(number, folder, how):
    """Let `how` happen at the step `number` of what this process does to files in `folder`.

    Ctrl-C only where it writes: a second one, while it tidies up, may leave some.
    """
    seen = [0]

    def hook(event, arguments):
        if event not in _STEPS or str(folder) not in str(arguments[0]):
            return
        if how is kill or _writes(event, arguments):
            seen[0] += 1
            if seen[0] == number:
                how()

    sys.addaudithook(hook)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    raise KeyboardInterrupt


def saved_until(number, encoder, folder, how):
    """Save in a process of its own that is stopped; whether it came to the end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            stop_at(number, folder, how)
            encoder.save_pretrained(folder)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


@pytest.fixture(scope="module")
def encoders():
    _, old = pair_of("vit")
    _, new = pair_of("vit")
    with torch.no_grad():
        new.norm.bias += 1
    return old, new


@pytest.mark.parametrize(("how", "over_another"), [(kill, False), (kill, True), (interrupt, True)])
def test_a_save_that_is_stopped_leaves_the_old_or_the_new(how, over_another, encoders, tmp_path):
    old, new = encoders
    number, ended, outcomes = 0, False, set()
    while not ended:
        number += 1
        folder = tmp_path / str(number)
        if over_another:
            old.save_pretrained(folder)
            before = (folder / "model.safetensors").read_bytes()
        ended = saved_until(number, new, folder, how)
        files = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        stored = (
            (folder / "model.safetensors").read_bytes() if "model.safetensors" in files else b""
        )
        new.save_pretrained(folder)  # the rest of a kill is in nobody's way
        now = (folder / "model.safetensors").read_bytes()
        if over_another:
            assert stored in (before, now) and "config.json" in files
            assert how is kill or files == ["config.json", "model.safetensors"]
            outcomes.add("old" if stored == before else "new")
        elif "config.json" in files:  # the last of the files
            assert stored == now
            outcomes.add("new")
        shutil.rmtree(folder)
    assert number > 3
    assert outcomes == ({"old", "new"} if over_another else {"new"})
