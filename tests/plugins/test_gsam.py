"""A minimizer of another package: GSAM passes the contract tests and trains from the command line."""

import json
from pathlib import Path

import pytest

from tests.support.plugins import plugin_folder, run_python, run_saq, run_tests
