"""The errors of ONNX and ONNX Runtime in one plain sentence, without places in their source, addresses and temporary files."""

from __future__ import annotations

import logging
import re

log = logging.getLogger("penult.extractor")

MOST = 240  # characters of a reason
# A place in their source, and the signature of the function there
PLACE = r"\S*\w\.(?:cc|h|cpp|cu|hpp):\d+:? ?"
SIGNATURE = r"(?:[\w:<>&*,]+ ){0,3}[\w:<>~]*::[\w:<>~]+\((?:[^()]|\([^()]*\))*\)(?: const)?(?: \[with [^]]*\])? ?"
NOISE = [
    (r"\[ONNXRuntimeError\] : \d+ : \w+ : ", ""),
    (r"Load model from .*? failed:\s*", ""),
    (r"Exception during initialization: |Exception caught: |This is an invalid model\. ", ""),
    (r"In Node, \(\"([^\"]*)\", (\w+), \"[^\"]*\", -?\d+\) : .*?, Error ", r"\2 '\1': "),
    (r"Node \(([^()]*)\) Op \((\w+)\) (?:\[\w+\] )?", r"\2 '\1': "),
    (r"Non-zero status code returned while running (\w+) node\. Name:'([^']*)' Status Message: ", r"\1 '\2': "),
    (rf"{PLACE}(?:{SIGNATURE}|\w+ )?", ""),
    (r"[^:]*? was false\.\s*(?=\S)", " "),
    (r"(?:'|\")?/(?:tmp|var|private)/[^\s'\",;]*(?:'|\")?", "the file"),
    (r"\b0x[0-9a-fA-F]+\b", "an address"),
    (r"Please (?:fix|check) .*|==> Context: .*", ""),
    (r" ''", ""),
    (r"\s+", " "),
]


def reason(error: Exception) -> str:
    """Why ONNX or ONNX Runtime refuses something: one plain sentence, without its full stop. ``-v`` shows the whole text.

    >>> reason(RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Load model from /tmp/x.onnx failed:Fatal error: no Op registered"))
    'Fatal error: no Op registered'
    """
    text = str(error).strip()
    log.debug("%s: %s", type(error).__name__, text)
    for pattern, plain in NOISE:
        text = re.sub(pattern, plain, text)
    first = re.split(r"(?<=[a-z\])'}])\. (?=[A-Z])", text.strip())[0] if len(text) > MOST else text.strip()
    first = first if len(first) <= MOST else first[: MOST - 3].rsplit(" ", 1)[0] + " ..."
    return first.rstrip(". ") or type(error).__name__
