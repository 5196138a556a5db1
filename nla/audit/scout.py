"""The audit as a scanner for Inspect Scout: `scout scan nla/nla_audit -T ./logs`.

Inspect loads this module by its entry point, with Scout and without: it imports either way, quietly and quickly, and
without Scout it offers nothing.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("inspect_scout") is not None:
    from nla.audit.scanner import nla_audit as nla_audit
