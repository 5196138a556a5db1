"""What works came to, as responses and events; and errors, as the three things that every one of ours says."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from nla.autoencoder import NLA
from nla.baselines import GLOBAL, cosine_of_ignorance
from nla.errors import ConfigError, NLAError, RequestError
from nla.metrics import cosine, fve_from_errors, mse
from nla.models.points import Point, context_length
from nla.pair.explanations import Explanation
from nla.serve import schema
from nla.serve.prepare import Prepared
from nla.serve.works import Continue, Explain, Told
from nla.text.claims import claims

log = logging.getLogger(__name__)


def token(prepared: Prepared, index: int) -> dict[str, Any]:
    """The fields of :class:`nla.serve.schema.Token`."""
    span = prepared.encoded.spans[index]
    fields = {
        "token": span.text,
        "token_id": span.token_id,
        "position": span.index,
        "start": span.start,
        "end": span.end,
        "fragment_index": span.fragment - 1,
        "fragment_count": span.fragments,
        "added": span.added,
    }
    if prepared.places is not None:
        place = prepared.places[index]
        fields |= {"role": place.role, "message_index": place.message, "section": place.section}
    return fields


def tokenized(prepared: Prepared) -> schema.TokenizeResponse:
    """All tokens of a text or chat."""
    tokens = [schema.Token(**token(prepared, index)) for index in range(len(prepared.encoded.ids))]
    return schema.TokenizeResponse(text=prepared.encoded.text, prompt_length=len(tokens), tokens=tokens)


def extracted(work: Explain, point: Point) -> schema.ExtractResponse:
    """Activations of a text."""
    assert work.prepared is not None and work.vectors is not None
    rows = zip(work.columns, work.vectors.tolist(), work.vectors.norm(dim=1).tolist(), strict=True)
    tokens = [
        schema.TokenActivation(**token(work.prepared, column), activation=vector, l2_norm=norm)
        for column, vector, norm in rows
    ]
    return schema.ExtractResponse(pair=work.pair, point=str(point), layer_index=point.layer, tokens=tokens)


def description(explanation: Explanation) -> dict[str, Any]:
    """The fields of :class:`nla.serve.schema.Description`."""
    mean = explanation.trust.cosine
    return {
        "description": Counter(explanation.texts).most_common(1)[0][0],
        "mse": 2 * (1 - mean),
        "cosine_similarity": mean,
        "samples": [
            {"text": text, "claims": claims(text), "complete": complete, "cosine": one}
            for text, complete, one in zip(explanation.texts, explanation.complete, explanation.cosine, strict=True)
        ],
        "trust": explanation.trust._asdict(),
    }


def explained(work: Explain, row: int) -> dict[str, Any]:
    """The fields of :class:`nla.serve.schema.ExplainResult`."""
    assert work.prepared is not None and work.vectors is not None
    norm = float(work.vectors[row].norm())
    return {**token(work.prepared, work.columns[row]), **description(work.explanations[row]), "l2_norm": norm}


def completed(work: Continue) -> dict[str, Any]:
    """The fields of :class:`nla.serve.schema.CompletionResponse`."""
    assert work.prepared is not None
    written: str = work.future.result()
    return {
        "pair": work.pair,
        "completion": written,
        "text": work.prepared.encoded.text + written,
        "steered": work.steer is not None,
        "seed": work.seed,
    }


def scored(nla: NLA, activation: Float[Tensor, " d"], text: str, before: str | None) -> dict[str, Any]:
    """The figures of :class:`nla.serve.schema.ScoreResponse`; they need the decoder.

    Raises:
        EmptyTextError, VocabularyError, ContextLengthError: see :meth:`nla.pair.decoder.Decoder.prompt_rows`.
    """
    target, baseline = activation[None], nla.baselines.get(GLOBAL)
    rebuilt, (empty,) = nla.decoder.decode([text]), nla.decoder.decode([""], strict=False)
    reached, error = float(cosine(target, rebuilt)[0]), mse(target, rebuilt)
    return {
        "mse": float(error[0]),
        "cosine_similarity": reached,
        "margin": reached - float(cosine_of_ignorance(target, empty, nla.baselines)[0]),
        "fve": None if baseline is None else fve_from_errors(error, baseline),
        "moved": None if before is None else float(cosine(rebuilt, nla.decoder.decode([before]))[0]),
    }


def described_pair(name: str, nla: NLA, adapters: Sequence[str]) -> schema.PairInfo:
    """What /pairs says of a pair. It may load a model: call it before anything is served."""
    config, point = nla.config, nla.point
    return schema.PairInfo(
        name=name,
        target=config.target,
        point=str(point),
        layer_index=point.layer,
        d_model=config.d_model,
        context=context_length(nla.base_of("target")),
        max_new_tokens=config.max_new_tokens,
        chat=bool(nla.tokenizer.chat_template),
        activation_norm=config.activation_norm,
        doubts=nla.doubts,
        metrics=_plain(nla.metrics),
        target_adapters=list(adapters),
    )


def _plain(value: Any) -> Any:
    """JSON without numbers that are not finite, which become null."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _name: None)


def event(work: Explain | Continue, told: Told, point: Point) -> schema.Wire:
    """What a request hears, as one event."""
    if told.row is None:
        n = None if work.prepared is None else len(work.prepared.encoded.ids)
        planned = work.planned if isinstance(work, Explain) else None
        if isinstance(work, Explain) and work.source is not None:
            planned = [work.columns[row] for row in work.planned]
        total = 1 if planned is None else len(planned)
        return schema.StartEvent(
            pair=work.pair, layer_index=point.layer, total=total, prompt_length=n, positions=planned
        )
    position = told.row
    if isinstance(work, Explain) and work.source is not None:
        position = work.columns[told.row]
    if told.done is None:
        return schema.TextEvent(position=position, sample=told.sample, text=told.text)
    assert isinstance(work, Explain)
    if work.source is None:
        return schema.DescribeEvent(position=position, **description(told.done))
    return schema.ExplainEvent(**explained(work, told.row))


def typed(error: BaseException) -> tuple[schema.Error, int]:
    """Any error as what is sent of it, and its status. What is no fault of the request is logged, not sent."""
    if isinstance(error, RequestError):
        status = error.status
    elif isinstance(error, NLAError):
        status = 422 if isinstance(error, ValueError | ConfigError) else 500
    else:
        log.error("a request failed", exc_info=error)
        return schema.Error(got="a fault of nla itself", expected="an answer", fix="report what its log says"), 500
    return schema.Error(**{part: _whole(getattr(error, part)) for part in ("got", "expected", "fix")}), status


def _whole(text: str) -> str:
    """A text that can be sent: half a character, which JSON may name, becomes a question mark."""
    return text.encode(errors="replace").decode()


def invalid(errors: Sequence[Any]) -> RequestError:
    """What pydantic found wrong with a request, as a typed error."""
    first = errors[0]
    where = ".".join(str(part) for part in first.get("loc", ()) if part != "body") or "the body"
    expected = str(first.get("msg", "a request of this route")).removeprefix("Value error, ")
    more = f" ({len(errors) - 1} more are wrong)" if len(errors) > 1 else ""
    got = f"{where} = {json.dumps(first.get('input'), default=str, ensure_ascii=False)}"
    return RequestError(got, expected + more, "see the route's schema in /openapi.json", status=422)
