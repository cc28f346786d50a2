"""Training on more features than fit into memory: how much there is, who can do with less, and rows that are read each time."""

from __future__ import annotations

import logging

log = logging.getLogger("penult.classifiers")
