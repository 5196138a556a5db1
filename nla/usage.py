"""What the commands accept, and the help they give. Imports nothing heavy: ``nla --help`` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

OK, FAILED, USAGE, INTERNAL, INTERRUPTED = 0, 1, 2, 70, 130

ABOUT = """\
Read a language model's activations as text, reconstruct them from the text alone, and check the text against causes.

Without a download everything runs on Couplets, a small embedded model that plans a rhyme before it writes it.
"""
START = """\
start here:
  nla demo                                    the whole way once, in under a minute
  printf 'In spring Anna left a red ribbon near the rat,\\n' | nla explain -
  nla COMMAND --help                          what a command does, with examples
"""
EXIT_CODES = """\
exit codes:
  0    done; with --check, every threshold holds
  1    --check was given and a threshold does not hold
  2    the command or its input is wrong; one line on stderr says what to do next
  70   an error of the program itself, with its traceback on stderr
  130  stopped by Ctrl-C; the same command resumes a training
"""
EXPLAIN = """\
examples:
  nla explain 'In spring Anna left a red ribbon near the rat,'
  printf 'In spring Anna left a red ribbon near the rat,\\n' | nla explain - --positions last
  nla explain --file poem.txt --positions '/\\n/' --samples 8
  nla explain --file poem.txt --json | jq '.notes[] | [.token, .texts[0], .trust]'

positions:
  all         every token (the default)
  last        the last token
  3,5         tokens by their index, from 0
  /PATTERN/   tokens whose text matches this regular expression, such as /\\n/ for line breaks

trust is high, medium or low, from three figures of which the weakest decides:
  cosine      of the activation and what the decoder makes of the explanation
  agreement   how much the samples say the same
  margin      cosine beyond what a text reaches that knows nothing of the activation
"""
STEER = """\
The last token of TEXT is explained, a word of the explanation is replaced wherever it stands, both texts are decoded,
and the target goes on writing with the difference added at that token. A random direction of equal norm stands beside
it: an edit that does no more than that one has shown nothing.

examples:
  printf 'In spring Anna left a red ribbon near the rat,\\n' | nla steer - --replace cat=bat
  nla steer --file line1.txt --replace cat=bat --strength 1.5 --json
"""
FIDELITY = """\
How well are activations reconstructed from their explanations, by kind of position, beside the rocks?

examples:
  nla eval fidelity
  nla eval fidelity runs/couplets/joint/pair --warm-start runs/couplets/warmstart/pair --out runs/report --check
"""
RHYMES = """\
Do explanations name the word that the target verifiably plans? Gate by patching, naming, adversaries, counterfactuals,
edit-and-steer with controls.

examples:
  nla eval rhymes --items 60
  nla eval rhymes couplets/plain              a target without a pair: is the plan used, or only decodable?
  nla eval rhymes runs/couplets/joint/pair --warm-start runs/couplets/warmstart/pair \\
      --continued runs/couplets/control/pair --out runs/report --check
"""
GATES = """\
Is the organism what it claims to be? Behaviour, patches at every point, controls of equal norm, a linear probe.

examples:
  nla eval gates couplets/planner --check
  nla eval gates couplets/plain --out runs/report --check
"""
READERS = """\
The same activations, splits and items for probes, lenses, SelfIE, readers of the visible text, and the pair; with label
budgets, retention in the reconstruction, random labels, transfer to held-out words, paired tests.

examples:
  nla eval readers couplets --out runs/report --check
  nla eval readers switchboard --out runs/report --check
"""
GRAPH = """\
Does a pair name what an attribution graph says is there? Reads the JSON of circuit-tracer, Neuronpedia and nla trace.

examples:
  nla trace couplets --out runs/trace
  nla eval graph runs/trace/*.json --check
"""
TWO_HOP = """\
Switchboard answers questions with a step that is never written. Gate by patching, naming, adversaries, counterfactual.

examples:
  nla eval two-hop --items 60
  nla eval two-hop runs/switchboard/joint/pair --warm-start runs/switchboard/warmstart/pair --out runs/report --check
"""
AUDITING = """\
Does `nla audit` find what was planted in Switchboard, and stay silent on sham and base? A reader of the text beside it.

examples:
  nla eval auditing --items 20
  nla eval auditing my/pair --plants my/plants --out runs/report --check
"""
PLANTS = """\
Adapters on Switchboard's target plant secret words, a hidden objective, awareness of a test, expected languages and
familiar names; each has a sham twin. First the gates of behaviour; then what the pair, which never saw them, reads.

examples:
  nla eval plants --out runs/report --check
  nla eval plants my/pair --plants my/plants --items 40
"""
AUDIT = """\
Transcripts are rendered with the target's own chat template, read where turns are decided, explained, and held against
rubrics: what the target thought and said, and what it thought and did not say, beside control transcripts.

examples:
  nla audit chats.jsonl --pair PAIR --controls plain.jsonl --out runs/audit
  nla audit logs/run.eval --pair PAIR --rubric evaluation-awareness --rubric my_rubric.yaml
  nla audit chats.jsonl --pair PAIR --target-adapter adapter/ --control-target base --out runs/audit
"""
TRACE = """\
Where does a model use what a minimal pair exchanges? Attribution shortlists tokens and points, patches measure them
beside random directions of equal length. Writes attribution graphs, which `nla eval graph` and viewers read.

examples:
  nla trace couplets --out runs/trace
  nla trace couplets/plain --check
  nla trace MODEL --pairs pairs.jsonl --out runs/trace
"""
PROBE = """\
Probes, lenses, SelfIE, readers of the text and the pair on your own labelled texts: CSV, JSON, JSON lines or Parquet.

examples:
  nla probe poems.csv --text line --label season
  nla probe poems.jsonl --text line --label season --positions '/ near/' --words 'winter=winter,snow' --out runs/probe
"""
TRAIN = """\
A recipe's stages run in order: extract, describe, warmstart, joint, control. A stage whose inputs have not changed is
skipped; one that was stopped, by Ctrl-C or a full disk, resumes when the same command is given again.

examples:
  nla train couplets --dry-run                which stages would run
  nla train couplets                          the shipped pair, from nothing
  nla train couplets --until warmstart --set warmstart.encoder_steps=100 --set out=runs/try
  nla train my_recipe.yaml
"""
INFO = """\
examples:
  nla info                                    the embedded pair, and the versions installed
  nla info runs/couplets/joint/pair --json
"""
DEMO = """\
Held-out texts go through the target; every token is explained; activations are reconstructed from the explanations
alone and scored beside the rocks; then the explanations are checked against a rhyme plan that patching shows to be
causal. Chats of a model with a planted goal are audited beside a sham's. Readers are compared on secret words.
"""


class Parser(argparse.ArgumentParser):
    """argparse with help kept as it is written, and usage errors that name the next step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> Any:
        self.exit(USAGE, f"{self.prog}: {message}. Next: `{self.prog} --help` shows how it is used\n")


def build_parser() -> Parser:
    """All commands and their options; the parsed ``command`` is a name such as "explain" or "eval rhymes"."""
    parser = Parser(prog="nla", description=ABOUT, epilog=f"{START}\n{EXIT_CODES}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _command(commands, "demo", "the three jobs on the embedded organisms, in under two minutes", DEMO)
    command = _command(commands, "explain", "explain a text's activations, token by token", EXPLAIN)
    _text_options(command)
    command.add_argument("--positions", default="all", metavar="WHICH", help="all, last, 3,5 or /PATTERN/")
    command.add_argument("--samples", type=int, default=4, metavar="N", help="explanations per token (default 4)")
    command.add_argument("--svg", type=Path, metavar="FILE", help="also write the token view as a picture")
    command = _command(commands, "steer", "edit an explanation and steer the target by the difference", STEER)
    _text_options(command)
    command.add_argument("--replace", required=True, metavar="OLD=NEW", help="the word to replace, wherever it stands")
    command.add_argument("--strength", type=float, default=1.0, help="of the difference, over the activation's norm")
    _eval_commands(commands)
    _audit_command(commands)
    _tool_commands(commands)
    command = _command(commands, "train", "make a pair from a recipe", TRAIN)
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    command.add_argument("--until", metavar="STAGE", help="the last stage to run")
    command.add_argument("--dry-run", action="store_true", help="only say which stages would run")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe's value")
    command = _command(commands, "info", "what a pair is: target, point, sizes, figures, versions", INFO)
    command.add_argument("pair", nargs="?", default="couplets", metavar="PAIR", help="name, folder or hub id")
    return parser


def _command(commands: Any, name: str, about: str, epilog: str, group: str = "") -> Parser:
    command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".", epilog=epilog)
    command.set_defaults(command=f"{group} {name}".strip())
    command.add_argument("--json", action="store_true", help="print JSON, for programs")
    return command


def _text_options(command: Parser) -> None:
    command.add_argument("text", nargs="?", metavar="TEXT", help="the text; - reads it from standard input")
    command.add_argument("--file", type=Path, help="read the text from a file")
    command.add_argument("--pair", default="couplets", help="name, folder or hub id (default: couplets)")


def _eval_commands(commands: Any) -> None:
    """The evaluations; an option's name is the parameter that the evaluation's ``run`` takes, listed in ``options``."""
    about = "judge a pair or an organism"
    group = commands.add_parser("eval", help=about, description=about[0].upper() + about[1:] + ".", epilog=EXIT_CODES)
    kinds = group.add_subparsers(title="evaluations", metavar="WHICH", required=True)
    command = _evaluation(kinds, "fidelity", "reconstruction, by kind of position", FIDELITY, "n_documents", "couplets")
    _before(command)
    about = "explanations against the causally verified rhyme plan"
    command = _evaluation(kinds, "rhymes", about, RHYMES, "n_items", "couplets")
    _before(command)
    command.add_argument("--continued", metavar="PAIR", help="the control: the warm start simply trained on")
    command.set_defaults(options=("n_items", "warm_start", "continued"))
    about = "what the organism itself does and uses"
    command = _evaluation(kinds, "gates", about, GATES, "n_documents", "couplets/planner")
    command.add_argument("--variant", choices=("planner", "plain"), help="whose bounds to hold it against")
    command.set_defaults(options=("n_documents", "variant"))
    about = "the hidden step of two-hop questions, causally verified"
    command = _evaluation(kinds, "two-hop", about, TWO_HOP, "n_items", "switchboard")
    _before(command)
    command.set_defaults(options=("n_items", "warm_start"))
    about = "audits of chats in which a plant shows, beside shams"
    command = _evaluation(kinds, "auditing", about, AUDITING, "n_chats", "switchboard")
    _plants(command)
    command.set_defaults(options=("n_chats", "plants"))
    about = "thoughts that adapters planted, beside sham twins"
    command = _evaluation(kinds, "plants", about, PLANTS, "n_prompts", "switchboard")
    _plants(command)
    command.set_defaults(options=("n_prompts", "plants"))
    about = "the pair beside probes and other readers, on the same activations"
    command = _evaluation(kinds, "readers", about, READERS, "n_items", "couplets")
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
    command = _command(kinds, "graph", about, GRAPH, group="eval")
    command.add_argument("model", nargs="+", metavar="FILE", help="graphs: the others' concepts are distractors")
    command.add_argument("--pair", help="name, folder or hub id (default: couplets)")
    command.add_argument("--samples", dest="n_samples", type=int, metavar="N", help="explanations of each activation")
    _judged(command)
    command.set_defaults(options=("pair", "n_samples"))


def _tool_commands(commands: Any) -> None:
    """Jobs of the suite on a user's own material."""
    command = _command(commands, "trace", "find where a model uses a latent, and write attribution graphs", TRACE)
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
    command = _command(commands, "probe", "compare readers on your own labelled texts", PROBE)
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
    """Transcripts; an option's name is the parameter that :func:`nla.audit.run.run` takes, listed in ``options``."""
    command = _command(commands, "audit", "what a model thought, and did not say, in transcripts", AUDIT)
    command.add_argument(
        "paths", nargs="+", type=Path, metavar="FILE", help="JSON, JSON lines, chat text, Inspect, Petri"
    )
    command.add_argument("--pair", default="couplets", help="name, folder or hub id (default: couplets)")
    command.add_argument("--rubric", dest="rubrics", action="append", metavar="NAME", help="built in, or a YAML file")
    command.add_argument("--positions", metavar="WHICH", help="structure (the default), all, random or /PATTERN/")
    command.add_argument("--budget", type=int, metavar="N", help="positions of each transcript at most (default 64)")
    command.add_argument("--samples", type=int, metavar="N", help="explanations of each position (default 4)")
    command.add_argument("--controls", action="append", type=Path, metavar="FILE", help="transcripts without")
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
    command.add_argument("--check", action="store_true", help="exit with 1 if a finding stands")
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


def _before(command: Parser) -> None:
    command.add_argument("--warm-start", metavar="PAIR", help="the pair before joint training, to compare with")
    command.set_defaults(options=("n_documents", "warm_start"))
