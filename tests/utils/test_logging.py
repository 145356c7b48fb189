"""The package's logger: one handler, plain messages, other ranks silent, the application's kept."""

import subprocess
import sys
import textwrap

import pytest


def run(code, **environment):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


SAY = """
import logging, sys
from kdtoolkit.utils.logging import configure_logging
assert "rich" not in sys.modules
def say():
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger("kdtoolkit.part"), level)(f"[{level}] {'word ' * 40}end")
"""


def test_plain_messages_once():
    out, _ = run(SAY + """
for _ in range(3):
    logger = configure_logging()
assert len(logger.handlers) == 1 and not logging.getLogger().handlers
say()
""", COLUMNS="60")  # fmt: skip
    words = " ".join(out.split())
    assert words.count("end") == 2 and words.startswith("[info] word") and "[warning]" in words
    assert "INFO" not in words and ".py" not in words


@pytest.mark.parametrize("call, environment, shown", [
    ("configure_logging('DEBUG')", {}, 3),
    ("configure_logging('ERROR')", {}, 0),
    ("configure_logging(rank=1)", {}, 1),
    ("configure_logging('DEBUG', rank=1)", {}, 1),
    ("configure_logging('ERROR', rank=1)", {}, 0),
    ("configure_logging()", {"RANK": "2"}, 1),
    ("logging.getLogger('kdtoolkit').setLevel('ERROR'); configure_logging()", {}, 0),
])  # fmt: skip
def test_levels(call, environment, shown):
    out, _ = run(f"{SAY}\n{call}\nsay()", **environment)
    assert out.count("end") == shown


def test_an_applications_handlers_are_kept():
    out, err = run(SAY + """
logging.basicConfig(level="DEBUG", format="mine: %(message)s")
logger = configure_logging()
assert not logger.handlers and len(logging.getLogger().handlers) == 1
say()
""")  # fmt: skip
    assert not out and err.count("mine: [") == 2
