"""lm-evaluation-harness over small models: scores against its own HFLM, answers, tasks of our own without network."""

import json
import threading

import pytest
import torch
from small_models import small_config

from micro import interventions
from micro.cli import main as cli
from micro.errors import RunError
from micro.modeling import MiCRoForCausalLM
from micro.testing import tiny_tokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from micro.evaluation import MiCRoLM, harness


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = small_config(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model = MiCRoForCausalLM(config).to(torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


ITEMS = [
    {"question": "Where is the key?", "choices": ["in the drawer", "in the sea", "on a river"], "gold": 0},
    {"question": "What is 12 and 7?", "choices": ["19", "15", "4"], "gold": 0},
    {"question": "What freezes at zero degrees?", "choices": ["iron", "sand", "water"], "gold": 2},
    {"question": "Who is sad?", "choices": ["Mia", "the box", "winter"], "gold": 0},
    {"question": "What means large?", "choices": ["short", "big", "mild"], "gold": 1},
]


@pytest.fixture
def tasks(tmp_path):
    """Two tasks whose data are a file beside them."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "items.json").write_text(json.dumps(ITEMS))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/items.json\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        f"task: own_choice\n{data}output_type: multiple_choice\ndoc_to_text: 'Question: {{{{question}}}}\\nAnswer:'\n"
        "doc_to_choice: choices\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n"
        "metadata:\n  version: 3\n"
    )
    (folder / "words.yaml").write_text(
        f"task: own_words\n{data}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: '{{choices[gold]}}'\ngeneration_kwargs:\n  until: ['.', ' the']\n  max_gen_toks: 12\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    return folder


def requests(kind, arguments):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


PAIRS = [
    *[(f"Question: {item['question']}\nAnswer:", f" {choice}") for item in ITEMS for choice in item["choices"]],
    ("", "the key is in the drawer"),
    ("She knows ", "it was moved"),
    ("The answer is " * 30, "15."),
]


def hflm(model, tokenizer):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    return huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)


def test_it_is_a_model_of_the_harness(model, tokenizer):
    lm = MiCRoLM(model, tokenizer)
    assert isinstance(lm, LM)
    assert "/" not in lm.tokenizer_name
    assert lm.chat_template(True) == tokenizer.chat_template
    text = lm.apply_chat_template([{"role": "user", "content": "Who?"}])
    assert text.endswith("<|im_start|>assistant\n")


def test_log_likelihoods_are_those_of_the_harness_own_model(model, tokenizer):
    given = requests("loglikelihood", PAIRS)
    got = MiCRoLM(model, tokenizer, progress=False).loglikelihood(given, disable_tqdm=True)
    want = hflm(model, tokenizer).loglikelihood(given, disable_tqdm=True)
    assert [g[0] for g in got] == pytest.approx([w[0] for w in want], abs=1e-4)  # HFLM computes softmax in float32
    assert [g[1] for g in got] == [w[1] for w in want]


def test_rolling_log_likelihoods_are_those_of_the_harness_own_model(model, tokenizer):
    texts = [("the key is in the drawer. " * n,) for n in (1, 3, 9)]
    given = requests("loglikelihood_rolling", texts)
    lm = MiCRoLM(model, tokenizer, max_length=20, progress=False)
    other = hflm(model, tokenizer)
    other._max_length = 20
    want = other.loglikelihood_rolling(given, disable_tqdm=True)
    assert lm.loglikelihood_rolling(given, disable_tqdm=True) == pytest.approx(want, abs=1e-3)


GENERATE = [
    ("Tom thinks that", {"until": ["\n"], "max_gen_toks": 12}),
    ("The verb", {"until": ["e", "o"], "max_gen_toks": 12}),
    ("Water freezes at zero", {"until": ["\n"], "max_gen_toks": 12}),
    ("Rivers carry sand", {"until": [], "max_gen_toks": 5, "do_sample": False}),
]


def test_answers_are_those_of_the_harness_own_model(model, tokenizer):
    given = requests("generate_until", GENERATE)
    want = hflm(model, tokenizer).generate_until(given, disable_tqdm=True)
    by_engine = MiCRoLM(model, tokenizer, batch_size=2, progress=False)
    by_model = MiCRoLM(model, tokenizer, batch_size=3, engine=False, progress=False)
    assert by_engine.generate_until(given, disable_tqdm=True) == want
    assert by_model.generate_until(given, disable_tqdm=True) == want
    assert by_engine._completer.uses_engine and not by_model._completer.uses_engine
    assert any(text for text in want)


def test_a_stop_string_ends_the_work_too(model, tokenizer):
    from micro.evaluation.completing import Completer, Sampling

    class Counting:
        eos_token_id = pad_token_id = tokenizer.eos_token_id

        def __init__(self):
            self.kept = []

        def decode(self, ids, skip_special_tokens=False):
            self.kept = list(ids)
            return "x" * (len(ids) - 1) + "STOP" if len(ids) >= 4 else "x"

    for engine in (True, False):
        watcher = Counting()
        text = Completer(model, watcher, engine=engine).complete([[9, 8]], ["STOP"], Sampling(50), seeds=[0])
        assert len(watcher.kept) == 4
        assert text == ["xxx"]


def test_sampling_is_the_same_in_any_batch(model, tokenizer):
    given = requests(
        "generate_until", [(text, {"until": [], "max_gen_toks": 6, "temperature": 1.0}) for text, _ in GENERATE]
    )
    answers = [
        MiCRoLM(model, tokenizer, batch_size=n, seed=4, progress=False).generate_until(given, disable_tqdm=True)
        for n in (1, 4)
    ]
    assert answers[0] == answers[1]
    other = MiCRoLM(model, tokenizer, seed=5, progress=False).generate_until(given, disable_tqdm=True)
    assert other != answers[0]


def test_steering_changes_scores_and_answers(model, tokenizer):
    free, steered = (MiCRoLM(model, tokenizer, progress=False, **c) for c in ({}, {"ablate": "social+logic"}))
    scores = [lm.loglikelihood(requests("loglikelihood", PAIRS[:3]), disable_tqdm=True) for lm in (free, steered)]
    assert scores[0] != scores[1]
    answers = [lm.generate_until(requests("generate_until", GENERATE), disable_tqdm=True) for lm in (free, steered)]
    assert answers[0] != answers[1]


def test_an_expert_may_be_called_by_its_index(model, tokenizer):
    assert MiCRoLM(model, tokenizer, force=0, ablate=[2]).controls == {"force": 0, "ablate": [2]}


def test_interventions_reach_answers_too(model, tokenizer):
    given = requests("generate_until", GENERATE[:1])
    lm = MiCRoLM(model, tokenizer, progress=False)
    free = lm.generate_until(given, disable_tqdm=True)
    with model.intervene(interventions.zero("ffn")):
        lesioned = lm.generate_until(given, disable_tqdm=True)
    assert lesioned != free
    assert lm.generate_until(given, disable_tqdm=True) == free


def test_model_arguments_as_text(folder):
    text = f"pretrained={folder},ablate=social,logic,bias=world:1.5,language:-2,experts_per_token=2"
    lm = MiCRoLM.create_from_arg_string(text, {"batch_size": 3, "max_batch_size": None, "device": None})
    assert lm.controls == {
        "ablate": ["social", "logic"],
        "bias": {"world": 1.5, "language": -2.0},
        "experts_per_token": 2,
    }
    assert lm.batch_size == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ablate": "socal"}, "unknown expert 'socal'"),
        ({"ablat": "social"}, "unknown argument 'ablat'; did you mean 'ablate'"),
        ({"bias": "logic=1"}, "NAME:NUMBER"),
    ],
)
def test_wrong_arguments_are_named(model, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        MiCRoLM(model, tokenizer, **arguments)


def test_a_loaded_model_needs_its_tokenizer(model):
    with pytest.raises(ValueError, match="needs its tokenizer"):
        MiCRoLM(model)


def test_a_tokenizer_needs_an_end_of_text(model):
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        MiCRoLM(model, endless)


def test_a_text_that_begins_with_bos_gets_no_second_one(model):
    class Beginning:
        bos_token_id, eos_token_id = 1, 2

        def decode(self, ids):
            return "<s>"

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + [5] * len(text)}

    lm = MiCRoLM(model, Beginning())
    assert lm.tok_encode("ab") == [1, 5, 5]
    assert lm.tok_encode("<s>") == [5, 5, 5]
    assert lm.tok_encode("ab", add_special_tokens=False) == [5, 5]
    assert lm.tok_encode("ab", left_truncate_len=2) == [5, 5]
    assert MiCRoLM(model, Beginning(), add_bos_token=False).tok_encode("ab") == [5, 5]


def test_an_option_of_generation_that_does_not_exist_here_is_named(model, tokenizer):
    given = requests("generate_until", [("a", {"num_beams": 3})])
    with pytest.raises(ValueError, match="'num_beams' is not supported"):
        MiCRoLM(model, tokenizer, progress=False).generate_until(given)


def test_prompts_that_are_too_long_lose_their_beginning(model, tokenizer):
    lm = MiCRoLM(model, tokenizer, max_length=8, progress=False)
    long = "the key is in the drawer " * 5
    got = lm.loglikelihood(requests("loglikelihood", [(long, "and the sea")]), disable_tqdm=True)[0][0]
    ids = tokenizer(long + "and the sea")["input_ids"]
    first = len(tokenizer(long.rstrip())["input_ids"])
    shown = torch.tensor([ids[-9:]])
    with torch.no_grad():
        logits = model(input_ids=shown[:, :-1]).logits[0].log_softmax(-1)
    count = len(ids) - first
    want = float(logits[torch.arange(8 - count, 8), shown[0, 1:][-count:]].sum())
    assert got == pytest.approx(want, abs=1e-9)
    assert lm.truncated == 1


def test_own_tasks_run_without_network(model, tokenizer, tasks, tmp_path):
    result = harness.run(
        model, tokenizer, tasks=["own_choice", "own_words"], include_path=tasks, log_samples=True, batch_size=2
    )
    rows = {(row["task"], row["metric"]): row for row in result.rows}
    accuracy = rows["own_choice", "acc"]
    assert accuracy["items"] == 5 and accuracy["version"] == 3 and accuracy["shots"] == 0
    scorer = MiCRoLM(model, tokenizer, progress=False)
    right = 0
    for item in ITEMS:
        pairs = [(f"Question: {item['question']}\nAnswer:", f" {choice}") for choice in item["choices"]]
        scores = [s for s, _ in scorer.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]
        right += scores.index(max(scores)) == item["gold"]
    assert accuracy["value"] == pytest.approx(right / 5)
    if accuracy["stderr"] is not None:
        assert accuracy["low"] == pytest.approx(accuracy["value"] - 1.96 * accuracy["stderr"])
    assert len(result.samples["own_words"]) == 5
    result.save(tmp_path)
    assert (tmp_path / "harness_samples.jsonl").read_text().count("\n") == 10
    assert harness.HarnessResult.load(tmp_path).table().equals(result.table())
    assert result.plot().axes


@pytest.fixture
def hub(monkeypatch):
    """Puts a hub in place of the real one: an address at which somebody answers, or nobody."""
    from datasets import config
    from huggingface_hub import constants

    def at(address):
        for module, names in ((constants, ("ENDPOINT", "HF_ENDPOINT")), (config, ("HF_ENDPOINT",))):
            for name in names:
                monkeypatch.setattr(module, name, address, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
        return lambda: (constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE)

    return at


def test_without_network_missing_data_are_named_at_once(model, tokenizer, tasks, hub, monkeypatch):
    (tasks / "far.yaml").write_text(
        "task: far\ndataset_path: nobody-here/nothing-there\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{question}}'\nmetric_list:\n  - metric: exact_match\n"
    )
    offline = hub("http://127.0.0.1:9")  # the port of discard: nobody listens
    slept = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", slept.append)
    with pytest.raises(RunError, match=r"far are not on this machine.*nobody-here/nothing-there.*include_path"):
        harness.run(model, tokenizer, tasks="far", include_path=tasks)
    assert slept == []
    assert offline() == (False, False)
    assert harness.run(model, tokenizer, tasks="own_choice", include_path=tasks, limit=2).rows


def test_with_network_nothing_is_changed(hub):
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    offline = hub(f"http://127.0.0.1:{server.server_port}")
    with harness._cache_alone_if_no_hub():
        assert offline() == (False, False)
    thread.join(10)
    server.server_close()


def test_the_own_folder_is_read_first_and_all_tasks_only_where_they_are_needed(tmp_path):
    """The index of all tasks takes seconds, so a stand-in counts how often it is made."""
    from micro.evaluation.harness import _manager

    made = []

    class Index:
        def __init__(self, include_path=None, include_defaults=True):
            made.append((include_path, include_defaults))
            self.all_tasks = (["mine"] if include_path else []) + (["theirs"] if include_defaults else [])

    own = str(tmp_path)
    assert _manager(Index, ["mine"], own).all_tasks == ["mine"]
    assert made == [(own, False)]
    assert _manager(Index, ["mine", "theirs"], own).all_tasks == ["mine", "theirs"]
    assert made[1:] == [(own, False), (own, True)]
    with pytest.raises(ValueError, match=r"no task 'thiers' in lm-eval [\d.]+ or in "):
        _manager(Index, ["mine", "thiers"], own)
    with pytest.raises(ValueError, match="your own is given by include_path"):
        _manager(Index, ["mine"], None)


def test_the_command_runs_tasks_and_writes_files(folder, tasks, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["evaluate", "harness", str(folder), "--tasks", "own_choice", "--include-path", str(tasks)]
    assert cli.run([*arguments, "--ablate", "social,logic", "--limit", "3", "--output", str(out)]) == 0
    assert "own_choice" in capsys.readouterr().out
    saved = json.loads((out / "harness.json").read_text())
    assert saved["settings"]["controls"] == {"ablate": "['social', 'logic']"}
    assert saved["rows"][0]["items"] == 3
    assert (out / "harness.png").is_file()
    assert cli.run([*arguments, "--include-path", str(tmp_path / "no-folder")]) == 2
    assert "no such folder of task files" in capsys.readouterr().err
