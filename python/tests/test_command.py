"""What the command refuses before it has cost anything, each in one line, and what it forgives."""

import json

import pytest
from tiny import bert, llama, t5

from mats_stream import Statistics, cli


def written(path, records, mark=""):
    path.write_text(mark + "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for name, model in (("bert", bert()), ("llama", llama()), ("t5", t5())):
        model.save_pretrained(place / name)
    return place


CLASSES = [{"input_ids": [3, 4, 5], "label": 0}, {"input_ids": [3, 6], "label": 2}]
TEXTS = [{"input_ids": [3, 4, 5]}, {"input_ids": [3, 6, 7, 8]}]


@pytest.fixture
def command(tmp_path, models, capsys):
    def run(model, records, task, *more, out="s", mark=""):
        path = written(tmp_path / "data.jsonl", records, mark)
        code = cli.main([str(models / model), "--data", str(path), "--task", task, "--out", str(tmp_path / out), *map(str, more)])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def refused(command):
    def check(text, *arguments, **options):
        code, error = command(*arguments, **options)
        lines = [line for line in error.splitlines() if line.startswith("mats-stream-collect: error:")]
        assert code == 2 and len(lines) == 1 and text in lines[0], error
        assert "Traceback" not in error

    return check


def test_a_head_that_the_checkpoint_has_not(refused, command):
    refused("has no score.weight, which LlamaForSequenceClassification needs", "llama", CLASSES, "classification")
    refused("has no cls.predictions", "bert", TEXTS, "causal-lm")
    assert command("llama", TEXTS, "causal-lm")[0] == 0


def test_a_head_that_is_in_the_adapter(command, models, tmp_path):
    peft = pytest.importorskip("peft")
    import transformers

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    records = [{**record, "label": record["label"] % 2} for record in CLASSES]
    for labels in (2, 3):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(models / "llama", num_labels=labels)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / f"adapter{labels}")
        code, error = command("llama", records, "classification", "--adapter", tmp_path / f"adapter{labels}", out=str(labels))
        # The config of the base model has two labels.
        assert code == (0 if labels == 2 else 2) and (labels == 2 or "size mismatch" in error), error


def test_places_that_are_not_there(refused):
    for place in ("../nowhere", "/nowhere/model", "nowhere/a/b"):
        refused("does not exist", place, CLASSES, "classification")
    refused("--adapter ./nowhere: does not exist", "bert", CLASSES, "classification", "--adapter", "./nowhere")


def test_records_that_do_not_fit(refused):
    refused("data.jsonl:2: label 3 is no class of the model's 3", "bert", [CLASSES[0], {**CLASSES[1], "label": 3}],
            "classification")
    refused("data.jsonl:1: token 40 is none of the model's 40", "llama", [{"input_ids": [3, 40]}], "causal-lm")
    refused("token 41 is none", "t5", [{"input_ids": [3], "labels": [41]}], "seq2seq")
    for choices in ("xy", [], ["a"], [3]):
        refused("`choices` is no list of", "t5", [{"input_ids": [3], "labels": [4], "choices": choices}], "seq2seq")
    refused("`choices` is no list of texts", "t5", [{"input": "a", "target": "b", "choices": [3]}], "seq2seq")
    refused("needs the text field `text_pair`", "bert", [{"text": "a", "text_pair": 3, "label": 0}], "classification")
    refused("every example has log-likelihood 0", "bert", [{**record, "label": -100} for record in CLASSES], "classification")


def test_devices(refused):
    refused("--device: there is no cuda:63", "bert", CLASSES, "classification", "--device", "cuda:63")
    refused("--device: `gpu` is none", "bert", CLASSES, "classification", "--device", "gpu")


def test_what_is_forgiven(command, tmp_path):
    code, error = command("bert", CLASSES, "classification", "--kinds", "input_gram, fisher_diagonal", mark="\ufeff")
    assert code == 0, error
    kinds = {key.rsplit("/", 1)[1] for key in Statistics.load(tmp_path / "s")}
    assert kinds == {"input_gram", "fisher_diagonal"}


def test_files_that_are_there(command, refused, monkeypatch, tmp_path):
    assert command("bert", CLASSES, "classification")[0] == 0
    code, error = command("bert", CLASSES, "classification", "--resume")
    assert code == 0 and "is finished already" in error
    refused("already there, of another run", "bert", CLASSES, "classification", "--resume", "--seed", "1")
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("the model was loaded"))
    refused("is already there", "bert", CLASSES, "classification")


def test_tokenised_choices(command):
    records = [{"input_ids": [3, 4], "labels": [5], "choices": [[5], [6, 7]]}]
    code, error = command("t5", records, "seq2seq", "--fisher", "true")
    assert code == 0, error
