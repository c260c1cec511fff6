"""Third-party noise: logging, warnings and bars off, unless the user asked for them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from eval.settings import Settings


@contextlib.contextmanager
def environment(settings: Settings, local: bool) -> Iterator[None]:
    """Set what the libraries read from the environment when imported; put it back afterwards.

    `local` says that the model is here: then, with an offline `data_dir`, the hub is never asked for anything.
    """
    variables = {"TOKENIZERS_PARALLELISM": "false"}
    if not settings.debug:  # libraries set their own level when imported
        variables |= {"DATASETS_VERBOSITY": "critical", "TRANSFORMERS_VERBOSITY": "error"}
    if settings.offline:
        variables |= {"HF_DATASETS_OFFLINE": "1"} | ({"HF_HUB_OFFLINE": "1"} if local else {})
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def muted(settings: Settings, progress: bool = False) -> Iterator[None]:
    """Keep lm-eval and its libraries off the screen; with `progress`, drop bars too where nobody watches them.

    stdout is for results, so that what libraries print goes to stderr with --debug and nowhere without.
    """
    if settings.debug:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    loggers = {logging.getLogger(n): logging.ERROR for n in ("lm_eval", "transformers", "accelerate")}
    loggers[logging.getLogger("datasets")] = logging.CRITICAL  # its errors are raised as well, as one sentence
    levels = {logger: logger.level for logger in loggers}
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        if progress and (settings.quiet or not sys.stderr.isatty()):
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        for logger, level in loggers.items():
            logger.setLevel(level)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
