"""Silence for libraries that print progress bars and advice of their own while they load."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Hide loading bars, advice and warnings of transformers; errors and bars of downloads still come through."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as hf_logging

    verbosity, loading_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    set_download_bars = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf_logging.set_verbosity(logging.ERROR)
        hf_logging.disable_progress_bar()  # takes the hub's with it
        set_download_bars()
        try:
            yield
        finally:
            hf_logging.set_verbosity(verbosity)
            if loading_bars:
                hf_logging.enable_progress_bar()
            set_download_bars()
