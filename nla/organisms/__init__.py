"""Small models with planted, verified behaviour, which come with the library, by name."""

from nla.organisms import couplets, switchboard

TARGETS = {
    "couplets/planner": couplets.PLANNER,
    "couplets/plain": couplets.PLAIN,
    "switchboard/target": switchboard.TARGET,
}
"""Folders of the embedded targets."""
PAIRS = {"couplets": couplets.PAIR, "couplets/planner": couplets.PAIR, "switchboard": switchboard.PAIR}
"""Folders of the embedded pairs."""
_CONFIGS = switchboard.ADAPTERS_FOLDER.glob("*/adapter_config.json")
ADAPTERS = {f"switchboard/{config.parent.name}": config.parent for config in _CONFIGS}
"""Folders of the embedded adapters on targets: plants and their shams."""
RUBRICS = {f"switchboard/{file.stem}": file for file in switchboard.RUBRICS_FOLDER.glob("*.yaml")}
"""What audits of those plants look for."""
