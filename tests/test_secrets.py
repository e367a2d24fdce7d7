"""Secrets come from the environment, and nothing that a run writes or prints tells them."""

import json
import logging
import re
import zipfile

import pytest
from omegaconf import OmegaConf

from conftest import launch
from espalier.config import compose, inherit, overrides, redaction
from espalier.errors import ConfigError
from helpers.secrets import CONTROL, FROM_VARIABLE, IN_DOTENV, IN_ENVIRONMENT, LOGIN, TYPED, contents, forms, found

SMALL = ("model=mlp", "model.hidden=[16]", "trainer.max_epochs=1", "callbacks=[checkpoint,monitor]")
FAILING = (*SMALL, *LOGIN, "+callbacks.login.fails=true", "logger=[csv,wandb]")
COMMANDS = {  # and their exit codes
    ("train", *FAILING): 1,
    ("train", *SMALL, *LOGIN, "logger=[csv,wandb,tensorboard]"): 0,
    (
        "compress",
        "source=latest",
        "compression=[ptq]",
        "task.batches=[1]",
        "logger=[csv,wandb]",
        *LOGIN[:2],
        *FROM_VARIABLE,
    ): 0,
    ("report", "source=latest"): 0,
    ("train", "-m", "seed=0,1", *FAILING): 3,
    ("train", *SMALL, "--traceback", f"data.password={TYPED}"): 2,
    ("train", *SMALL, f"+callbacks.login={{token: {TYPED}}}"): 2,
    ("train", *SMALL, f"trainer.max_epochs={IN_ENVIRONMENT['HF_TOKEN']}"): 2,
    ("train", *SMALL, "model.depth='${oc.env:HF_TOKEN}'"): 2,
    ("train", *SMALL, "model.bias='${oc.env:HF_TOKEN}'"): 2,
}


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What ten commands wrote and printed, with canaries wherever a secret may come from."""
    folder = tmp_path_factory.mktemp("canaries")
    (folder / ".env").write_text(f"HF_TOKEN={IN_DOTENV}\nexport SERVICE_SECRET='{IN_DOTENV}'\n")
    done = launch(folder, "helpers.secrets", json.dumps(list(COMMANDS)), **IN_ENVIRONMENT, WANDB_MODE="offline")
    assert re.findall(r"exit code (\d)", done.stdout) == list(map(str, COMMANDS.values())), done.stdout + done.stderr
    return {**dict(contents(folder)), "stdout": done.stdout.encode(), "stderr": done.stderr.encode()}


def test_no_secret_is_found_in_what_runs_leave_behind(left):
    assert len(left) > 50
    assert found([*IN_ENVIRONMENT.values(), IN_DOTENV, TYPED], left.items()) == []


@pytest.mark.parametrize(
    "place",
    [
        *("config.yaml", "overrides.yaml", "provenance.json", "run.log", "/data.pkl", ".wandb"),
        *("hparams.yaml", "multirun.yaml", "stdout"),
    ],
)
def test_the_search_sees_what_is_no_secret_in_each_place_that_holds_a_configuration(left, place):
    chosen = {name: content for name, content in left.items() if name.endswith(place)}
    assert chosen
    assert found([CONTROL], chosen.items()) != []


def test_the_search_knows_a_secret_in_other_forms(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for place, form in enumerate(sorted(forms(TYPED))):
            archive.writestr(str(place), b"before" + form + b"after")
    hits = found([TYPED], contents(tmp_path))
    assert {hit.partition(":")[0] for hit in hits} == {f"a.zip/{place}" for place in range(len(forms(TYPED)))}


def test_a_secret_on_the_command_line_costs_one_line_which_does_not_repeat_it(espalier):
    done = espalier("train", f"+data.api_key={TYPED}")
    assert done.code == 2
    assert done.err == (
        "espalier: +data.api_key: holds a secret, which the history of the shell keeps; "
        "set it in the environment and say '+data.api_key=${oc.env:NAME}'\n"
    )
    assert not (done.folder / "logs").exists()


def test_a_secret_in_a_configuration_file_is_refused():
    with pytest.raises(ConfigError, match=r"^data\.token: holds a secret, which every copy of its file keeps; "):
        redaction.refuse_written({"data": {"token": TYPED, "batch_size": 64}})
    redaction.refuse_written({"data": {"token": "${oc.env:HF_TOKEN}", "password": None, "pad_token": "<pad>"}})


def test_no_key_of_any_option_is_taken_for_that_of_a_secret():
    files = sorted(compose.CONF.rglob("*.yaml"))
    assert len(files) > 50
    for file in files:
        plain = OmegaConf.to_container(OmegaConf.load(file))
        assert redaction.scrub_tree(plain) == plain


def test_a_run_that_goes_on_takes_its_secret_from_the_command_line_again(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", TYPED)
    word = "+callbacks.login.token=${oc.env:MY_TOKEN}"
    stored = redaction.scrub_tree(OmegaConf.to_container(compose.compose([word]), resolve=True))
    assert stored["callbacks"]["login"]["token"] == redaction.HIDDEN
    words = ["resume=RUN", word]
    resumed = inherit.from_resumed(compose.compose(words), stored, overrides.parse(words))
    assert resumed.callbacks.login.token == TYPED


def test_a_stored_configuration_without_its_secret_says_what_to_do():
    with pytest.raises(ConfigError) as refused:
        redaction.require_told({"login": {"token": redaction.HIDDEN, "user": "me"}}, "callbacks")
    assert str(refused.value) == (
        "callbacks.login.token: a secret, which no run stores; "
        "say again where it is: '+callbacks.login.token=${oc.env:NAME}'"
    )


@pytest.mark.parametrize(
    ("words", "safe"),
    [
        (["run", "logger.wandb.api_key=abc"], ["run", "logger.wandb.api_key=***"]),
        (["run", "+x={token: abc, lr: 3}"], ["run", "+x={token: ***, lr: 3}"]),
        (["run", "--password", "abc", "trainer.max_epochs=3"], ["run", "--password", "***", "trainer.max_epochs=3"]),
        (["run", "db.secret='a b'"], ["run", "db.secret=***"]),
        (
            ["run", "source=https://h/x?X-Amz-Signature=ab12&part=2"],
            ["run", "source=https://h/x?X-Amz-Signature=***&part=2"],
        ),
        (["run", "mirror=s3://me:abc@h/x"], ["run", "mirror=s3://***@h/x"]),
        (["run", "mirror=http://abc@h/x"], ["run", "mirror=http://***@h/x"]),
        (["run", "source=https://h/x?key=abc&part=2"], ["run", "source=https://h/x?key=***&part=2"]),
    ],
)
def test_secrets_of_the_command_line_are_hidden(words, safe):
    assert redaction.scrub_words(words) == safe


@pytest.mark.parametrize(
    "text",
    [
        *("data.token=${oc.env:HF_TOKEN}", "data.token: needs a value", "model.pad_token=<pad>", "model.token_dim=64"),
        *("num_tokens=4", "tokenizer=bpe", "data.key=image", "monkey=5", "model.pool=token", "password=null"),
        *("ssh://git@h/x", "keys: a, b", "sk-learn", "accuracy 0.99"),
        *("data.path=/data/ASIA_population_dataset_2020", "hydra.run.dir=logs/sk-learn-baseline-2024-11"),
        *(
            "sk-classification-of-handwritten-digits-2024",
            "AKIA_experiments_of_november",
            "ASIAN_FOOD_PICTURES_2024_LARGE",
        ),
        *("hf_hub_download_of_yesterday", "abfs://my-container-2024-of-runs@account.dfs.core.windows.net/x"),
        *("see https://h/x, or mail me@h.org", "https://h/x@v2", "a commit 0fb9999c0ffee5eed0ddba11c0ffee5eed0ddba1"),
    ],
)
def test_what_only_looks_like_a_secret_stays(text):
    assert redaction.scrub(text) == text


@pytest.mark.parametrize(
    "token",
    [
        *("AKIAIOSFODNN7EXAMPLE", "ASIAQWERTY2345UIOP67", "AIzaSyA1234567890abcdefghijklmnopqrstuv"),
        *(f"sk-{'a1B2' * 12}", f"sk-proj-{'x9Yz' * 8}_{'q' * 20}", f"sk-ant-api03-{'Zk3-' * 3}{'m7Qp' * 12}-AA"),
        *(f"sk-{'0123456789abcdef' * 2}", f"sk-or-v1-{'0123456789abcdef' * 4}", f"sk_live_{'a1B2' * 6}"),
        *(f"hf_{'aBcD' * 8}xY", f"ghp_{'a1B2' * 9}", f"github_pat_{'a1B2' * 8}_x", f"glpat-{'a1-B' * 5}"),
        *(f"xoxb-{'123-' * 6}", f"wandb_v1_{'a1_B' * 8}"),
    ],
)
def test_tokens_of_services_are_hidden_wherever_they_stand(token: str):
    for text in ("{}", "data.path=/x/{}/y", "run_{}", "'{}'", "http://{}@h/x", "ssh://{}@h/x", "git clone {}"):
        assert redaction.scrub(text.format(token)) in (text.format("***"), text.format(f"{token[:3]}***"))


def test_a_token_as_user_of_an_address_is_refused_wherever_the_address_stands(espalier):
    for word in ("callbacks.checkpoint.mirror", "+note"):
        done = espalier("train", f"{word}=http://{TYPED}@127.0.0.1:9/x")
        assert (done.code, len(done.err.splitlines())) == (2, 1)
        assert f"{word}: holds a secret" in done.err
        assert TYPED not in done.err + done.out


def test_a_token_as_user_of_a_source_is_not_repeated(espalier):
    done = espalier("train", f"source=http://{TYPED}@127.0.0.1:9/x.ckpt")
    assert done.code == 2
    assert "source=http://***@127.0.0.1:9/x.ckpt" in done.err
    assert TYPED not in done.err + done.out
    assert found([TYPED], contents(done.folder)) == []


def test_a_number_that_is_none_is_no_secret():
    redaction.refuse_written({"optimizer": {"lr": float("nan")}})


@pytest.mark.parametrize(
    ("name", "value", "text", "safe"),
    [
        ("HF_TOKEN", "abcd1234", "is abcd1234, or abcd1234", "is ***, or ***"),
        ("MY_PASSWORD_2", "a b/c d e f", "at ?p=a%20b%2Fc%20d%20e%20f", "at ?p=***"),
        ("SSH_PRIVATE_KEY", "-----BEGIN\nabcdefgh\n", "abcdefgh", "***"),
        ("USE_AUTH", "true", "is true", "is true"),
        ("AUTH_METHOD", "kerberos", "/mnt/kerberos/x", "/mnt/kerberos/x"),
        ("KEY_EXCHANGE", "Diffie-hellman", "by Diffie-hellman", "by Diffie-hellman"),
        ("APP_SECRET", "espalier", "espalier.tasks.train", "espalier.tasks.train"),
        ("APP_SECRET", "hunterhunter", "is hunterhunter", "is ***"),
        ("DB_PASSWORD", "swordfish", "is swordfish", "is ***"),
        ("API_KEY", "abcdefghijklmnopqrst", "is abcdefghijklmnopqrst", "is ***"),
        ("TOKENIZERS_PARALLELISM", "disabled", "is disabled", "is disabled"),
        ("KEY_FOLDER", "/usr/lib", "/usr/lib/python", "/usr/lib/python"),
    ],
)
def test_values_of_variables_are_secret_if_their_name_speaks_of_one(monkeypatch, name, value, text, safe):
    monkeypatch.setenv(name, value)
    assert redaction.scrub(text) == safe


def test_a_log_record_whose_arguments_do_not_fit_is_left_to_its_handler():
    redaction.watch_output()
    record = logging.getLogRecordFactory()("canary", logging.WARNING, "", 1, "%d", ("x",), None)
    assert record.args == ("x",)


def test_a_long_text_costs_no_more_than_its_length():
    for part in ("a_", "://", "key-", "{ ", "?sig", "hf "):
        assert redaction.scrub(part * 50_000) == part * 50_000
