"""What the commands accept, and the help they give. Imports nothing heavy: ``nla --help`` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nla.cli import manual

OK, FAILED, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 70, 130


class Parser(argparse.ArgumentParser):
    """argparse with help kept as it is written, and usage errors that name the next step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> Any:
        self.exit(USAGE, f"{self.prog}: {message}. Next: `{self.prog} --help` shows how it is used\n")


def build_parser() -> Parser:
    """All commands and their options; the parsed ``command`` is a name such as "explain" or "eval rhymes"."""
    parser = Parser(prog="nla", description=manual.ABOUT, epilog=f"{manual.START}\n{manual.EXIT_CODES}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _command(commands, "demo", "the three jobs on the embedded organisms, in under two minutes", manual.DEMO)
    command = _command(commands, "explain", "explain a text's activations, token by token", manual.EXPLAIN)
    _text_options(command)
    command.add_argument("--positions", default="all", metavar="WHICH", help="all, last, 3,5 or /PATTERN/")
    command.add_argument("--samples", type=int, default=4, metavar="N", help="explanations per token (default 4)")
    command.add_argument("--target-adapter", metavar="FOLDER", help="a LoRA adapter on the target while it is read")
    command.add_argument("--svg", type=Path, metavar="FILE", help="also write the token view as a picture")
    _placed(command)
    command = _command(commands, "steer", "edit an explanation and steer the target by the difference", manual.STEER)
    _text_options(command)
    command.add_argument("--replace", required=True, metavar="OLD=NEW", help="the word to replace, wherever it stands")
    command.add_argument("--strength", type=float, default=1.0, help="of the difference, over the activation's norm")
    _placed(command)
    _eval_commands(commands)
    _audit_command(commands)
    _tool_commands(commands)
    _making_commands(commands)
    _format_commands(commands)
    command = _command(commands, "info", "what a pair is: target, point, sizes, figures, versions", manual.INFO)
    command.add_argument("pair", nargs="?", default="couplets", metavar="PAIR", help="name, folder or hub id")
    _placed(command)
    return parser


def _making_commands(commands: Any) -> None:
    """A pair from a recipe, and the first step of it alone."""
    command = _command(commands, "train", "make a pair from a recipe", manual.TRAIN)
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    command.add_argument("--until", metavar="STAGE", help="the last stage to run")
    command.add_argument("--dry-run", action="store_true", help="only say which stages would run, and what they take")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe's value")
    command = _command(commands, "extract", "store a target's activations of a corpus", manual.EXTRACT)
    command.add_argument("target", metavar="TARGET", help="folder or hub id")
    command.add_argument("source", metavar="CORPUS", help="a datasets name, or files: parquet, JSON lines, text, chats")
    command.add_argument("--point", required=True, help="such as resid_post.20, the output of block 20")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the store; continues what is there")
    command.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the target's own)")
    command.add_argument("--quantization", help="8bit or 4bit")
    command.add_argument("--revision", help="of the target on the hub")
    command.add_argument("--target-adapter", metavar="FOLDER", help="a LoRA adapter on the target")
    command.add_argument("--seed", type=int, default=0, help="of the positions")
    command.add_argument("--process", default="0/1", metavar="I/N", help="do the share of process I of N, from 0")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="how the corpus is read")


def _format_commands(commands: Any) -> None:
    """Pairs and data in other formats, and on the hub."""
    about = "published pairs and data as folders of this library"
    kinds = _group(commands, "import", about, manual.IMPORT)
    command = _command(kinds, "kitft", "a pair of full weights, AV and AR", manual.IMPORT, group="import")
    command.add_argument("av", metavar="AV", help="folder or hub id of the encoder")
    command.add_argument("ar", metavar="AR", help="folder or hub id of the decoder")
    command.add_argument("--quantization", help="8bit or 4bit, of all three models (default: as they are)")
    _imported(command)
    command = _command(kinds, "easynla", "a pair of LoRA adapters", manual.IMPORT, group="import")
    command.add_argument("av", metavar="AV", help="folder or hub id of the encoder's adapter")
    command.add_argument("ar", nargs="?", metavar="AR", help="folder of the decoder's weights (default: AV/critic)")
    command.add_argument("--sidecar", type=Path, metavar="FILE", help="nla_meta.yaml of the data it was trained on")
    _imported(command)
    _placed(command)
    command = _command(kinds, "parquet", "a data set of activations, as a store", manual.IMPORT, group="import")
    command.add_argument("file", type=Path, metavar="FILE", help="parquet, its sidecar beside it")
    command.add_argument("--tokenizer", required=True, metavar="TARGET", help="folder or hub id of the base model")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the store")
    kinds = _group(commands, "export", "pairs and stores in the reference's formats", manual.EXPORT)
    command = _command(kinds, "kitft", "adapters merged into two full-weight folders", manual.EXPORT, group="export")
    command.add_argument("pair", metavar="PAIR", help="name, folder or hub id")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the folders av and ar")
    command.add_argument("--drop-bias", action="store_true", help="leave out the head's bias, and measure what it did")
    command.add_argument("--store", type=Path, metavar="FOLDER", help="activations to measure that on")
    _placed(command)
    command = _command(kinds, "parquet", "a store as parquet with a sidecar", manual.EXPORT, group="export")
    command.add_argument("store", type=Path, metavar="STORE", help="a folder that `nla extract` made")
    command.add_argument("--split", default="train", help="train (the default) or eval")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="the parquet file")
    command = _command(commands, "push", "publish a pair on the hub", manual.PUSH)
    command.add_argument("pair", metavar="PAIR", help="name or folder")
    command.add_argument("repo", metavar="REPO", help="hub id, such as someone/nla-qwen2.5-7b")
    command.add_argument("--private", action="store_true", help="for you alone, if the repository is new")
    command.add_argument("--revision", metavar="BRANCH", help="a branch, made if there is none")
    command.add_argument("--message", metavar="TEXT", help="of the commit")


def _imported(command: Parser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the pair, as this library has it")
    command.add_argument("--target", help="folder or hub id of the model to read (default: the base that is named)")
    command.add_argument("--dtype", help="of the weights (default: as they are)")
    command.add_argument("--store", type=Path, metavar="FOLDER", help="activations that give FVE its denominator")


def _group(commands: Any, name: str, about: str, epilog: str) -> Any:
    group = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".", epilog=epilog)
    return group.add_subparsers(title="formats", metavar="FORMAT", required=True)


def _command(commands: Any, name: str, about: str, epilog: str, group: str = "") -> Parser:
    command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".", epilog=epilog)
    command.set_defaults(command=f"{group} {name}".strip())
    command.add_argument("--json", action="store_true", help="print JSON, for programs")
    return command


def _placed(command: Parser) -> None:
    about = "where to put it (default: the first GPU, or the CPU); of whole models ROLE=PLACE, such as encoder=cuda:1"
    command.add_argument("--device", action="append", metavar="PLACE", help=about)


def _text_options(command: Parser) -> None:
    command.add_argument("text", nargs="?", metavar="TEXT", help="the text; - reads it from standard input")
    command.add_argument("--file", type=Path, help="read the text from a file")
    command.add_argument("--pair", default="couplets", help="name, folder or hub id (default: couplets)")


def _eval_commands(commands: Any) -> None:
    """The evaluations; an option's name is the parameter that the evaluation's ``run`` takes, listed in ``options``."""
    about = "judge a pair or an organism"
    group = commands.add_parser(
        "eval", help=about, description=about[0].upper() + about[1:] + ".", epilog=manual.EXIT_CODES
    )
    kinds = group.add_subparsers(title="evaluations", metavar="WHICH", required=True)
    command = _evaluation(
        kinds, "fidelity", "reconstruction, by kind of position", manual.FIDELITY, "n_documents", "couplets"
    )
    _before(command)
    _read_texts(command)
    command.add_argument("--store", metavar="FOLDER", help="a store that `nla extract` made: its held-out part")
    command.add_argument("--device", metavar="PLACE", help="where to put it (default: the first GPU, or the CPU)")
    texts = ("texts", "chats", "positions", "n_activations", "store", "device")
    command.set_defaults(options=("n_documents", "warm_start", *texts))
    about = "explanations against the causally verified rhyme plan"
    command = _evaluation(kinds, "rhymes", about, manual.RHYMES, "n_items", "couplets")
    _before(command)
    command.add_argument("--continued", metavar="PAIR", help="the control: the warm start simply trained on")
    command.set_defaults(options=("n_items", "warm_start", "continued"))
    about = "what the organism itself does and uses"
    command = _evaluation(kinds, "gates", about, manual.GATES, "n_documents", "couplets/planner")
    command.add_argument("--variant", choices=("planner", "plain"), help="whose bounds to hold it against")
    command.set_defaults(options=("n_documents", "variant"))
    about = "the hidden step of two-hop questions, causally verified"
    command = _evaluation(kinds, "two-hop", about, manual.TWO_HOP, "n_items", "switchboard")
    _before(command)
    command.set_defaults(options=("n_items", "warm_start"))
    about = "audits of chats in which a plant shows, beside shams"
    command = _evaluation(kinds, "auditing", about, manual.AUDITING, "n_chats", "switchboard")
    _plants(command)
    command.set_defaults(options=("n_chats", "plants"))
    about = "thoughts that adapters planted, beside sham twins"
    command = _evaluation(kinds, "plants", about, manual.PLANTS, "n_prompts", "switchboard")
    _plants(command)
    command.set_defaults(options=("n_prompts", "plants"))
    about = "fidelity on a fine-tuned target, beside the target"
    command = _evaluation(kinds, "transfer", about, manual.TRANSFER, "n_documents", "switchboard")
    command.add_argument("--target-adapter", metavar="FOLDER", help="the fine-tune: a LoRA adapter on the target")
    _read_texts(command)
    command.set_defaults(options=("n_documents", "target_adapter", "texts", "chats", "positions", "n_activations"))
    about = "the pair beside probes and other readers, on the same activations"
    command = _evaluation(kinds, "readers", about, manual.READERS, "n_items", "couplets")
    command.add_argument(
        "--train",
        dest="n_train",
        type=int,
        metavar="N",
        help="documents, or activations, to fit on (default 1000)",
    )
    command.add_argument("--contrast", metavar="MODEL", help="another target of the same width, read by the same pair")
    _plants(command)
    _oracle(command)
    command.set_defaults(options=("n_items", "n_train", "n_samples", "contrast", "plants", "oracle", "question"))
    _graph_command(kinds)


def _graph_command(kinds: Any) -> None:
    about = "explanations against attribution graphs"
    command = _command(kinds, "graph", about, manual.GRAPH, group="eval")
    command.add_argument("model", nargs="+", metavar="FILE", help="graphs: the others' concepts are distractors")
    command.add_argument("--pair", help="name, folder or hub id (default: couplets)")
    command.add_argument("--samples", dest="n_samples", type=int, metavar="N", help="explanations of each activation")
    _judged(command)
    command.set_defaults(options=("pair", "n_samples"))


def _tool_commands(commands: Any) -> None:
    """Jobs of the suite on a user's own material."""
    command = _command(
        commands, "trace", "find where a model uses a latent, and write attribution graphs", manual.TRACE
    )
    command.add_argument("model", nargs="?", default="couplets", help="embedded name, folder or hub id")
    command.add_argument("--pairs", type=Path, metavar="FILE", help="minimal pairs, one JSON object a line")
    for name in ("prompt", "donor-prompt", "continuation", "donor-continuation"):
        command.add_argument(f"--{name}", metavar="TEXT", help="of one pair instead; all four")
    command.add_argument("--items", dest="n_pairs", type=int, metavar="N", help="pairs of an embedded world")
    command.add_argument(
        "--all-tokens", action="store_true", default=None, help="every token, whatever roles are named"
    )
    command.add_argument("--sites", dest="n_sites", type=int, metavar="N", help="patch at most so many (default 64)")
    command.add_argument(
        "--controls",
        dest="n_controls",
        type=int,
        metavar="N",
        help="random directions a site",
    )
    _judged(command)
    texts = ("prompt", "donor_prompt", "continuation", "donor_continuation")
    command.set_defaults(options=("pairs", *texts, "n_pairs", "all_tokens", "n_sites", "n_controls"))
    command = _command(commands, "probe", "compare readers on your own labelled texts", manual.PROBE)
    command.add_argument("model", type=Path, metavar="DATA", help="CSV, TSV, JSON, JSON lines or Parquet")
    command.add_argument("--text", required=True, metavar="COLUMN", help="the column of the texts")
    command.add_argument("--label", required=True, metavar="COLUMN", help="the column of the labels")
    command.add_argument("--group", metavar="COLUMN", help="the document that a row belongs to")
    command.add_argument("--pair", help="name, folder or hub id (default: couplets)")
    command.add_argument("--positions", metavar="WHICH", help="last (the default), all, or /PATTERN/")
    command.add_argument("--words", action="append", metavar="LABEL=WORD,WORD", help="words that name a class")
    command.add_argument("--max-rows", type=int, metavar="N", help="a random sample of a larger file (default 2000)")
    command.add_argument("--skip", action="store_true", default=None, help="leave out texts that cannot be read")
    _oracle(command)
    _judged(command)
    own = ("text", "label", "group", "pair", "positions", "words", "n_samples", "max_rows", "skip")
    command.set_defaults(options=(*own, "oracle", "question"))


def _audit_command(commands: Any) -> None:
    """Transcripts; an option's name is a field of :class:`nla.audit.settings.AuditSettings`, listed in ``options``."""
    command = _command(commands, "audit", "what a model thought, and did not say, in transcripts", manual.AUDIT)
    command.add_argument(
        "paths", nargs="+", type=Path, metavar="FILE", help="JSON, JSON lines, chat text, Inspect, Petri"
    )
    command.add_argument("--pair", default="couplets", help="name, folder or hub id (default: couplets)")
    command.add_argument("--rubric", dest="rubrics", action="append", metavar="NAME", help="built in, or a YAML file")
    command.add_argument("--positions", metavar="WHICH", help="structure (the default), all, random or /PATTERN/")
    command.add_argument("--budget", type=int, metavar="N", help="positions of each transcript at most (default 64)")
    command.add_argument("--samples", type=int, metavar="N", help="explanations of each position (default 4)")
    command.add_argument("--controls", action="append", type=Path, metavar="FILE", help="control transcripts")
    command.add_argument(
        "--target-adapter",
        metavar="FOLDER",
        help="a LoRA adapter on the target while it is read, or an embedded one: switchboard/goal",
    )
    command.add_argument("--control-target", metavar="FOLDER", help="read the controls with this; base: none")
    command.add_argument("--model-of", metavar="NAME", help="accept transcripts of this model, or of any")
    command.add_argument("--window", type=int, metavar="N", help="read in overlapping windows of N tokens")
    command.add_argument("--trim", action="store_true", default=None, help="take white space off the ends of messages")
    command.add_argument("--max-mb", type=float, metavar="MB", help="largest file, or line of JSON lines (default 64)")
    command.add_argument(
        "--skip-bad", action="store_true", default=None, help="leave out what cannot be read, and list it"
    )
    command.add_argument("--judge-url", metavar="URL", help="OpenAI-compatible endpoint; its key in NLA_JUDGE_KEY")
    command.add_argument("--judge-model", metavar="NAME", help="the judge's model")
    command.add_argument("--seed", type=int, metavar="N", help="of samples and random positions")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="write page and tables here; resumes from it")
    command.add_argument("--check", action="store_true", help="exit with 1 if a finding is significant")
    own = ("rubrics", "positions", "budget", "samples", "controls", "target_adapter", "control_target", "model_of")
    more = ("window", "trim", "max_mb", "skip_bad", "judge_url", "judge_model", "seed")
    command.set_defaults(options=(*own, *more))


def _plants(command: Parser) -> None:
    about = "of a pair on Switchboard: the adapters, one folder each (default: the embedded ones)"
    command.add_argument("--plants", type=Path, metavar="FOLDER", help=about)


def _oracle(command: Parser) -> None:
    command.add_argument("--samples", dest="n_samples", type=int, metavar="N", help="explanations of each activation")
    command.add_argument(
        "--oracle", type=Path, metavar="FOLDER", help="an activation oracle: PEFT adapter on the target"
    )
    command.add_argument("--question", help="what the oracle is asked; holds the pair's marker once")


def _evaluation(kinds: Any, name: str, about: str, epilog: str, size: str, default: str) -> Parser:
    command = _command(kinds, name, about, epilog, group="eval")
    command.add_argument("model", nargs="?", default=default, help=f"name, folder or hub id (default: {default})")
    command.add_argument("--items", dest=size, type=int, metavar="N", help="held-out documents to judge it on")
    _judged(command)
    return command


def _judged(command: Parser) -> None:
    command.add_argument("--out", type=Path, metavar="FOLDER", help="write JSON, table and picture here")
    command.add_argument("--card", type=Path, metavar="FOLDER", help="put the figures into this folder's README.md")
    command.add_argument("--check", action="store_true", help="exit with 1 if a threshold does not hold")


def _read_texts(command: Parser) -> None:
    about = "texts to read: .txt, a line each, or a table or JSON lines with a column `text` (default: an embedded \
target's own)"
    command.add_argument("--texts", metavar="FILE", help=about)
    command.add_argument("--chats", action="store_true", default=None, help="the file holds transcripts")
    command.add_argument("--positions", metavar="WHICH", help="all (the default), last, or /PATTERN/")
    command.add_argument("--activations", dest="n_activations", type=int, metavar="N", help="a sample (default 2000)")


def _before(command: Parser) -> None:
    command.add_argument("--warm-start", metavar="PAIR", help="the pair before joint training, to compare with")
    command.set_defaults(options=("n_documents", "warm_start"))
