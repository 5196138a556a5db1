"""``nla explain``, ``nla steer``, ``nla info``: a pair and a text in; what it says, what it does, what it is, out."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from nla.cli.console import LINE_WIDTH, OK, about, answer, emit, given_text, load, one_chat, show
from nla.cli.options import (
    Chat,
    Device,
    File,
    Json,
    Pair,
    PairArgument,
    TargetAdapter,
    Text,
    count,
    positions,
    replacement,
)
from nla.errors import ArgumentError, visible

STEER_SAMPLES, STEER_TOKENS = 8, 12
VERSIONS_OF = ("nla", "torch", "transformers", "peft", "trl")


def explain(
    text: Text = None,
    file: File = None,
    chat: Chat = None,
    pair: Pair = "couplets",
    which: Annotated[
        str, typer.Option("--positions", metavar="WHICH", help="all, last, 3,5 or /PATTERN/; see below.")
    ] = "all",
    samples: Annotated[int, count("--samples", "Explanations per token.", default=True)] = 4,
    target_adapter: TargetAdapter = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", show_default=False, help="Also write the token view as a web page."),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option("--svg", metavar="FILE", show_default=False, help="Also write the token view as a picture."),
    ] = None,
    device: Device = None,
    json: Json = False,
) -> int:
    r"""Explain a text's activations, token by token.

    examples:
      nla explain 'In spring Anna left a red ribbon near the rat,'
      printf 'In spring Anna left a red ribbon near the rat,\n' | nla explain - --positions last
      nla explain --file poem.txt --positions '/\n/' --samples 8
      nla explain --file poem.txt --html poem.html
      nla explain --chat chat.json --pair switchboard --target-adapter switchboard/goal
      nla explain --file poem.txt --pair pairs/27b \
          --device target=cuda:0 --device encoder=cuda:1 --device decoder=cuda:2
      nla explain --file poem.txt --json | jq '.explanations[] | [.token, .texts[0], .trust]'

    positions:
      all         every token (the default)
      last        the last token
      3,5         tokens by their index, from 0
      /PATTERN/   tokens whose text matches this regular expression, such as /\n/ for line breaks

    trust is high, medium or low, from three figures of which the weakest decides:
      cosine      of the activation and what the decoder makes of the explanation
      agreement   how much the samples say the same
      margin      cosine beyond what a text reaches that knows nothing of the activation

    --chat takes a file of one chat in any form that `nla audit` knows; - reads it from standard input.

    --html writes one file that works offline and without scripts: the text with its tokens coloured by trust, and for
    each token its claims, samples and figures.

    --json holds one object per token under "explanations": with its id and characters, and where several tokens share a
    character, which part it is ("fragment" of "fragments"). The same list stands under its old name "notes", which the
    next release leaves out.
    """
    words, chosen = given_text(text, file) if chat is None else None, positions(which)
    if chat is not None and (text is not None or file is not None):
        raise ArgumentError("--chat beside a text", "one of them", "give TEXT, --file or --chat")
    from nla.models.lora import other_base
    from nla.organisms import adapter_folder
    from nla.storage.files import try_file, write_atomic

    try_file(html)
    try_file(svg)
    nla = load(pair, device)
    adapter = adapter_folder(target_adapter)

    with nla.planted(adapter):
        acts = nla.read(one_chat(chat) if words is None else words, chosen)
    explanations = nla.explain(acts, samples=samples)
    remark = other_base(adapter, str(nla.base_of("target").name_or_path))
    remarks = [] if remark is None else [remark]
    if html is not None:
        write_atomic(html, explanations.to_html(f"{pair} at {nla.point}", [*nla.doubts, *remarks]))
    if json:
        content = explanations.to_json()
        said = {"remarks": remarks} if remarks else {}
        emit({**about(nla, pair), **said, "text": acts.texts[0], "explanations": content, "notes": content})
        if svg is None:
            return OK
    from nla.cli import view

    title = f"{pair} at {nla.point}: what each activation holds, in words"
    if svg is not None:
        write_atomic(svg, view.svg(view.token_view(explanations, ""), title, LINE_WIDTH))
    if not json:
        show(view.token_view(explanations, title))
    return OK


def steer(
    text: Text = None,
    file: File = None,
    pair: Pair = "couplets",
    *,
    replace: Annotated[
        str, typer.Option("--replace", metavar="OLD=NEW", help="The word to replace, wherever it stands.")
    ],
    strength: Annotated[
        float, typer.Option("--strength", metavar="S", help="Of the difference, over the activation's norm.")
    ] = 1.0,
    device: Device = None,
    json: Json = False,
) -> int:
    r"""Edit an explanation and steer the target by the difference.

    The last token of TEXT is explained, a word of the explanation is replaced wherever it stands, both texts are
    decoded, and the target goes on writing with the difference added at that token. A random direction of equal norm
    stands beside it: an edit that does no more than that one has shown nothing.

    examples:
      printf 'In spring Anna left a red ribbon near the rat,\n' | nla steer - --replace cat=bat
      nla steer --file line1.txt --replace cat=bat --strength 1.5 --json
    """
    old, new = replacement(replace)
    words = given_text(text, file)
    nla = load(pair, device)
    import torch

    from nla.cli import view
    from nla.pair.steer import edit_direction, generate_patched

    explanation = nla.explain(nla.read(words, "last"), samples=STEER_SAMPLES)[0]
    word = re.compile(rf"\b{re.escape(old)}\b")
    before = view.leading(explanation.texts, lambda sample: word.search(sample) is not None)
    if before is None:
        raise ArgumentError(
            f"--replace {replace}: no explanation of {visible(explanation.token)!r} says {old!r}",
            f"a word of its explanation: {view.leading(explanation.texts)}",
            "name one of its words, or end TEXT with the token that holds the plan (often a line break)",
        )
    after = word.sub(lambda _match: new, before)
    direction = edit_direction(nla.decoder, before, after)
    random = torch.randn(direction.shape, generator=torch.Generator().manual_seed(0))

    def written(directions: torch.Tensor | None, factor: float | None) -> list[str]:
        texts = [words] * (1 if directions is None else len(directions))
        with nla.role("target"):
            return generate_patched(
                nla.base, nla.tokenizer, texts, nla.point, "last", directions, STEER_TOKENS, strength=factor
            )

    (plain,), (steered, control) = written(None, None), written(torch.stack([direction, random]), strength)
    content = {
        "explanation": before,
        "edited": after,
        "strength": strength,
        "continuation": plain,
        "steered": steered,
        "random direction of equal norm": control,
    }
    if json:
        emit({**about(nla, pair), "text": words, **content})
    else:
        show(view.facts(content, f"steering {pair} at {nla.point}, at {visible(explanation.token)}"))
    return OK


def info(pair: PairArgument = "couplets", device: Device = None, json: Json = False) -> int:
    """Say what a pair is: target, point, sizes, figures, versions.

    examples:
      nla info                                    the embedded pair, and the versions installed
      nla info runs/couplets/joint/pair --json
    """
    nla = load(pair, device)
    import importlib.metadata

    from nla.models import points

    content = {
        **about(nla, pair),
        "architecture": points.backbone(nla.model).config.model_type,
        "blocks": len(points.blocks(nla.model)),
        "d_model": nla.config.d_model,
        "context": points.context_length(nla.model),
        "vocabulary": len(nla.tokenizer),
        "parameters": nla.n_parameters,
        "strata": sorted(nla.baselines),
        "device": str(nla.device),
        "metrics": nla.metrics,
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS_OF}
        | {"python": sys.version.split()[0]},
    }
    kind = "target, encoder and decoder, each a whole model" if nla.config.separate else "two adapters on one target"
    return answer(content, f"A pair: {kind}", json)
