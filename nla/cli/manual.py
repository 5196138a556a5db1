"""What the help of each command says, with examples."""

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
  nla explain --file chat.txt --pair switchboard --target-adapter switchboard/goal
  nla explain --file poem.txt --pair pairs/27b --device target=cuda:0 --device encoder=cuda:1 --device decoder=cuda:2
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
How well are activations reconstructed from their explanations, by kind of position, beside baselines: no explanation,
the mean, and reconstructions of another activation, of the same kind, and of another document? Of any pair, on texts,
chats or a store that it was not trained on; in the world Couplets also: is it true what explanations claim?

examples:
  nla eval fidelity
  nla eval fidelity someone/nla-qwen2.5-7b --texts held_out.txt --out runs/report
  nla eval fidelity runs/mine/joint/pair --store runs/mine/extract --warm-start runs/mine/warmstart/pair
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
  nla train qwen2.5-7b --dry-run              which stages would run; tokens, steps, memory and time of each
  nla train couplets                          the shipped pair, from nothing
  accelerate launch --num_processes 4 -m nla.train gemma-3-12b
  nla train couplets --until warmstart --set warmstart.encoder_steps=100 --set out=runs/try
  nla train my_recipe.yaml
"""
EXTRACT = """\
A corpus goes through the target, up to the point and no further; the chosen activations are stored in shards, with
their texts, in splits that share no text. Killed, the same command continues to the same bytes.

examples:
  nla extract Qwen/Qwen2.5-7B-Instruct HuggingFaceFW/fineweb --point resid_post.20 --out runs/acts \\
      --dtype bfloat16 --set config=sample-10BT --set streaming=true --set n_documents=10000
  nla extract my/model 'texts/*.parquet' --point resid_post.12 --set positions=every:8 --out runs/acts
  nla extract my/model chats.jsonl --point resid_post.12 --set kind=chat --set positions=turns --out runs/acts

KEY of --set is a field of nla.train.corpus.CorpusSettings: positions, n_positions, first_position, max_tokens,
n_documents, eval_fraction, text_column, streaming, config, split, revision, kind, ...
"""
IMPORT = """\
Published pairs and data in other formats, as folders of this library. Full weights are referred to, not copied.

examples:
  nla import kitft kitft/nla-qwen2.5-7b-L20-av kitft/nla-qwen2.5-7b-L20-ar --out pairs/qwen7b --store runs/acts
  nla import easynla ckpts/av ckpts/ar --out pairs/qwen8b
  nla import parquet data/rl_shuf.parquet --tokenizer Qwen/Qwen2.5-7B-Instruct --out runs/acts

FVE needs a denominator, which published pairs do not bring: --store takes it from the training split of a store of the
same target, revision, point and tokenizer, and refuses any other.
"""
EXPORT = """\
A pair of adapters as the two full-weight folders that the reference's client loads, or a store as its parquet.

examples:
  nla export kitft runs/qwen2.5-7b/joint/pair --out exported
  nla export kitft my/pair --out exported --drop-bias --store runs/acts
  nla export parquet runs/acts --out data/acts.parquet
"""
PUSH = """\
The token is that of `hf auth login` or HF_TOKEN. The folder is checked and published as it lies there; no model is
loaded. Of its card the header and the part between <!-- card --> and <!-- /card -->, which comes from metrics.json, are
made anew; what you wrote and what `nla eval ... --card` put there stays.

examples:
  nla push runs/qwen2.5-7b/joint/pair someone/nla-qwen2.5-7b --private
"""
TRANSFER = """\
How far does a pair's fidelity fall when its target is fine-tuned? The same tokens are read on the target and on the
fine-tune, before anyone trusts the text on it.

examples:
  nla eval transfer switchboard --target-adapter switchboard/goal
  nla eval transfer my/pair --target-adapter my/adapter --texts held_out.txt --out runs/transfer --check
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
