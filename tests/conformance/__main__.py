"""Run transformers' own common tests on our classes: what `make conformance` calls.

    python -m tests.conformance [PYTEST ARGUMENTS]    # with the installed release of transformers
    python -m tests.conformance page                  # docs/conformance.md, from what is kept

The tests are in transformers' source distribution, which pip fetches from the package index once
for each release. The outcome of a run of all of them goes into ``outcomes/``.
"""

import os
import subprocess
import sys

from tests.conformance import page, suite


def main(arguments):
    """What the module says."""
    if arguments == ["page"]:
        page.write()
        return 0
    # A part of a class is no outcome.
    part = any(argument.startswith(("-k", "-m")) for argument in arguments)
    outcome = "-" if part else str(page.OUTCOMES / f"{suite.RELEASE}.json")
    environment = os.environ | {"CONFORMANCE": outcome, "HF_HUB_OFFLINE": "1"}
    suite.fetch()
    command = [sys.executable, "-m", "pytest", "--benchmark-disable", "-q", *arguments]
    files = [] if any(argument.startswith("tests/") for argument in arguments) else [suite.HERE]
    done = subprocess.run([*command, *files], cwd=suite.ROOT, env=environment)
    page.write()
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
