"""Files and folders from elsewhere: they run no code, read nothing around them, and end in one sentence."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import consilience as cs
from consilience import report
from consilience.cli.main import main
from consilience.core.errors import ConsilienceError
from consilience.merging._files import Adapter, Memory, opened

# Configurations that name code.

CODE = """
import pathlib
def source(**_):
    pathlib.Path("PWNED").touch()
def module():
    pathlib.Path("PWNED").touch()
loss = metric = policy = source
"""
NAMED = {
    "data": "data: theirs.source",
    "options": "data: {theirs.source: {a: 1}}",
    "split": "split: theirs.source",
    "setting": "setting: theirs.source",
    "method": "method: {ewc: {}, theirs.source: {}}",
    "policy": "method: {er: {policy: theirs.policy}}",
    "aggregator": "method: {aggregate: {aggregator: theirs.policy}}",
    "called": "metric: accuracy,theirs.metric(average=1)",
    "metric": "metric: theirs.metric",
    "list": "metric: [theirs.metric]",
    "loss": "training: {loss: theirs.loss}",
    "losses": "training: {loss: {class: theirs.loss}}",
    "model": "model: theirs.module",
}


@pytest.fixture
def received(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from somebody, with a module that leaves a mark when a function of it is called."""
    (tmp_path / "theirs.py").write_text(CODE + "pathlib.Path('PWNED').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("text", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("way", ["config", "resume"])
def test_a_file_that_names_code_is_refused(text, way, received, capsys):
    folder = received / "theirs.source"  # a folder may have any name: it allows nothing
    folder.mkdir()
    (folder / "config.yaml").write_text(text)
    given = ["--resume"] if way == "resume" else ["--config", str(folder / "config.yaml")]
    assert main(["run", *given, "--out", str(folder)]) == 2
    assert "add --trust" in capsys.readouterr().err
    assert not (received / "PWNED").exists()


def test_code_that_the_user_typed_or_trusts_runs(received, capsys):
    (received / "c.yaml").write_text("metric: theirs.metric")
    main(["run", "--config", "c.yaml", "--metric", "accuracy", "--data", "theirs.source"])
    assert (received / "PWNED").exists()
    (received / "PWNED").unlink()

    (received / "c.yaml").write_text("data: theirs.source")
    assert main(["run", "--config", "c.yaml", "--trust"]) == 2
    assert (received / "PWNED").exists() and "must give a Source" in capsys.readouterr().err


def test_a_file_cannot_trust_itself(received, capsys):
    for command, text in {
        "run": "trust: true\ndata: theirs.source",
        "merge": "trust: true\nbase: none\nexperts: [a]",
    }.items():
        (received / "c.yaml").write_text(text)
        assert main([command, "--config", "c.yaml"]) == 2
        assert "give --trust yourself" in capsys.readouterr().err
    assert not (received / "PWNED").exists()


@pytest.mark.parametrize("command", ["compare", "merge"])
def test_other_commands_refuse_code_too(command, received, capsys):
    text = {
        "compare": "methods: [finetune, theirs.source]",
        "merge": "base: none\nexperts: [a, b]\naggregator: {dare: {then: theirs.source}}",
    }[command]
    (received / "c.yaml").write_text(text)
    main([command, "--config", "c.yaml", "--out", "new"])
    out = capsys.readouterr()
    assert "theirs.source" in out.out + out.err and not (received / "PWNED").exists()


# YAML is bounded.

BAD_YAML = {
    "alias": ("a: &a [1]\nb: [*a, *a]", "an alias"),
    "laughs": ("\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)), "an alias"),
    "twice in a text": ('stopping: "{patience: 3, patience: 5}"', "no key twice"),
    "deep in a text": (f'stopping: "{"[" * 30 + "]" * 30}"', "few levels"),
    "inner": ('stopping: "{a: &a [1], b: [*a, *a]}"', "no aliases"),
    "twice": ("seed: 1\nseed: 2", "the key 'seed' twice"),
    "twice inside": ("training: {lr: 1.0, lr: 0.1}", "the key 'lr' twice"),
    "deep": ("a: " + "[" * 30 + "]" * 30, "more than 20 levels"),
    "digits": ("seed: " + "9" * 5000, "limit"),
    "large": ("a: " + "x" * 2_000_000, "more than 1,048,576 bytes"),
    "object": ('!!python/object/apply:os.system ["id"]', "could not determine a constructor"),
    "list as key": ("{[1]: 2}", "unhashable key"),
    "bytes": ("a: \x00", "YAML"),
}


@pytest.mark.parametrize(("text", "says"), BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_is_not_bounded_is_refused(text, says, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    for command in ("run", "merge"):
        if not text.startswith("stopping") or command == "run":
            assert main([command, "--config", str(tmp_path / "c.yaml")]) == 2
            assert says in capsys.readouterr().err


# Folders of checkpoints.


def checkpoint(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    tensors = {"a.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


@pytest.mark.parametrize(
    "file", ["model.safetensors", "model.safetensors.index.json", "adapter_config.json", "config.json"]
)
def test_a_pipe_does_not_hang_a_merge(file, tmp_path):
    """A pipe that nobody writes to is no file; opened, it would wait for ever."""
    checkpoint(tmp_path / "base")
    checkpoint(tmp_path / "expert", 1)
    (tmp_path / "expert" / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "expert" / file)
    if file == "model.safetensors":
        with pytest.raises(ConsilienceError, match="must hold model.safetensors"):
            cs.merge(tmp_path / "base", [tmp_path / "expert"], out=tmp_path / "out")
    else:
        assert cs.merge(tmp_path / "base", [tmp_path / "expert"], out=tmp_path / "out").is_dir()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_names_files_in_its_folder(name, tmp_path):
    tensors = checkpoint(tmp_path / "base")
    save_file(tensors, tmp_path / "secret.safetensors")
    (tmp_path / "base" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a.weight": name}})
    )
    with pytest.raises(ConsilienceError, match=r"must name files in the folder|lacks \.\."):
        opened(tmp_path / "base")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_out_of_a_folder_are_refused(file, tmp_path):
    checkpoint(tmp_path / "base")
    secret = tmp_path / "secret"
    (tmp_path / "base" / "model.safetensors").rename(secret) if file.startswith("model") else (
        secret.write_text('{"password": 1}')
    )
    (tmp_path / "base" / file).symlink_to(secret)
    checkpoint(tmp_path / "expert", 1)
    with pytest.raises(ConsilienceError, match="links to a file outside its folder"):
        cs.merge(tmp_path / "base", [tmp_path / "expert"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    """models--x/snapshots/REVISION/FILE links to models--x/blobs/HASH."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    tensors = checkpoint(tmp_path / "plain")
    (tmp_path / "plain" / "model.safetensors").rename(blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert torch.equal(opened(snapshot).whole("a.weight"), tensors["a.weight"])


def test_a_merged_folder_has_no_code_nothing_hidden_and_no_paths(tmp_path):
    base = tmp_path / "home" / "base"
    base.mkdir(parents=True)
    checkpoint(base)
    facts = {
        "model_type": "tiny",
        "_name_or_path": "/home/alice/secret/run7",
        "auto_map": {"AutoModel": "m.M"},
    }
    (base / "config.json").write_text(json.dumps(facts))
    for name in ("tokenizer.json", "vocab.txt", "LICENSE", "modeling_m.py", ".env", "run.sh", "lib.so"):
        (base / name).write_text("{}")
    (base / "training_args.bin").write_bytes(b"PK")
    (base / "tokenizer_config.json").write_text('{"name_or_path": "/home/alice/secret/run7", "size": 3}')
    checkpoint(tmp_path / "home" / "expert", 1)

    with pytest.warns(UserWarning, match="code of its own"):
        out = cs.merge(base, [tmp_path / "home" / "expert"], out=tmp_path / "out")
    wanted = {"model.safetensors", "merge.json", "config.json", "tokenizer.json", "vocab.txt", "LICENSE"}
    wanted.add("tokenizer_config.json")
    assert {path.name for path in out.iterdir()} == wanted
    text = "".join(path.read_text() for path in out.iterdir() if path.suffix == ".json")
    assert str(tmp_path) not in text and "alice" not in text and '"run7"' in text


def test_patterns_of_an_adapter_do_not_hang(tmp_path):
    """A repeated group takes exponential time on a name that nearly fits."""
    base = Memory({f"{'a' * 40}.weight": torch.zeros(2, 2)}, "base")
    layer = "a" * 40
    tensors = {f"base_model.model.{layer}.lora_{n}.weight": torch.ones(2, 2) for n in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    for pattern in ("(a+)+b", "(a|a)*b", "(a*){9}b", "a*a*a*a*b", "(?=a)", r"(a)\1", "("):
        facts = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {pattern: 4}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
        with pytest.raises(ConsilienceError, match="pattern of an adapter"):
            Adapter(tmp_path, base)

    # Those that people write are read: the change is alpha / r B A.
    facts["alpha_pattern"] = {"b.*": 2, r"a+": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    change = Adapter(tmp_path, base).whole(f"{layer}.weight")
    assert torch.equal(change, torch.full((2, 2), 4 / 2 * 2.0))


# Headers.


def header(tensors: dict[str, Any], data: int, **more: Any) -> bytes:
    text = json.dumps({**tensors, **more}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(dtype: str, shape: Any, begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_HEADERS = {
    "a hole": header({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, 12),
    "an overlap": header({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, 8),
    "more data": header({"a": entry("F32", [1], 0, 4)}, 8),
    "a huge shape": header({"a": entry("F32", [2**62, 4], 0, 4)}, 4),
    "numbers in metadata": header({"a": entry("F32", [1], 0, 4)}, 4, __metadata__={"a": 1}),
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a truth": header({"a": entry("F32", [True], 0, 4)}, 4),
    "a negative": header({"a": entry("F32", [-1], 0, 4)}, 4),
    "twice": (text := b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":7}')
    and struct.pack("<Q", len(text)) + text + bytes(4),
    "claims": struct.pack("<Q", 2**40) + b"{}",
}


@pytest.mark.parametrize("data", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_header_that_others_refuse_is_refused(data, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ConsilienceError):
        opened(tmp_path / "x.safetensors")


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to three changes: a byte, a cut, a part twice, a number of the header; sometimes a right length."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(changed))
        match draw.randrange(5):
            case 0:
                changed[at] = draw.randrange(256)
            case 1:
                del changed[at : at + draw.randint(1, 9)]
            case 2:
                changed[at:at] = changed[at : at + draw.randint(1, 9)]
            case 3:
                digits = [i for i, byte in enumerate(changed) if chr(byte).isdigit()]
                changed[draw.choice(digits)] = ord(draw.choice("0123456789-.e"))
            case 4:
                changed[at:at] = draw.choice([b"{}", b"[", b'"', b",", b"null", b"\xff", b"1e9"])
    # Half of the mutants have a header of the length that they say, so that they get past the first check.
    end = changed.rfind(b"}") + 1
    if draw.random() < 0.5 and end > 8:
        changed[:8] = struct.pack("<Q", end - 8)
    return bytes(changed)


@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_what_our_reader_takes_safetensors_takes(count, tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.int64)}
    save_file(tensors, tmp_path / "whole.safetensors", {"format": "pt"})
    whole, path = (tmp_path / "whole.safetensors").read_bytes(), tmp_path / "x.safetensors"
    draw, taken = random.Random(0), 0
    for _ in range(count):
        path.write_bytes(mutated(whole, draw))
        try:
            found = opened(path)
            ours = {name: found.whole(name) for name in found.shapes}
        except ConsilienceError:
            continue
        theirs = load_file(path)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert tensor.dtype == ours[name].dtype and tensor.shape == ours[name].shape
            assert tensor.numpy().tobytes() == ours[name].numpy().tobytes()
        taken += 1
    assert 0 < taken < count
    with pytest.raises(SafetensorError):
        path.write_bytes(whole[:-1])
        load_file(path)


# Archives of arrays.


def archive(path: Path, shape: tuple[int, ...] = (4, 2, 2), data: bytes | None = None) -> Path:
    """An archive of images whose first array claims a shape."""
    arrays = {
        "train_labels": np.arange(4) % 2,
        "test_images": np.zeros((4, 2, 2), np.uint8),
        "test_labels": np.arange(4) % 2,
    }
    np.savez(path, **arrays)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file,
        file.open("train_images.npy", "w") as member,
    ):
        about = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, about)
        member.write(bytes(16) if data is None else data)
    return path


def test_an_archive_gets_no_more_memory_than_it_holds(tmp_path):
    assert len(cs.data.npz(archive(tmp_path / "good.npz")).train) == 4
    for shape in ((2**40, 2, 2), (400, 2, 3)):
        path = archive(tmp_path / f"{shape[0]}{shape[2]}.npz", shape)
        with pytest.raises(ConsilienceError, match="train_images.npy claims .* bytes of 144"):
            cs.data.npz(path)


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("consilience.data._sources.ROOM", 1 << 20)
    path = archive(tmp_path / "bomb.npz", (1 << 22, 2, 2), bytes(1 << 24))
    with pytest.raises(ConsilienceError, match=r"would unpack to .* more than 200 times its size"):
        cs.data.npz(path)


# Networks.

QUIET = """
import importlib, pkgutil, socket, sys

def refuse(*args, **more):
    raise AssertionError(f"a network call: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import consilience as cs
for module in pkgutil.walk_packages(cs.__path__, "consilience."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from consilience import report
schedule = cs.settings.continual(cs.data.split_classes(cs.data.digits(), 2))
result = cs.run(schedule, cs.methods.finetune(), training=cs.Training(epochs=1), out=sys.argv[1])
report.write([result], sys.argv[1] + ".html")
print("quiet")
"""


def test_no_default_makes_a_network_call(tmp_path):
    argv = [sys.executable, "-c", QUIET, str(tmp_path / "run")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.stdout == "quiet\n", done.stderr
    page = (tmp_path / "run.html").read_text()
    assert not re.search(r"(src|href|@import|url\()\s*=?\s*[\"'(]?https?:", page)


# Names.


def test_names_do_nothing_to_a_terminal_or_a_spreadsheet(tmp_path, capsys):
    """A class name with an escape sequence, a tag and a formula comes from data, as any other."""
    name = "\x1b]0;owned\x07\x1b[31m<script>alert(1)</script>"
    x, y = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    source = cs.data.arrays(x, y, name=f"=1+1{name}", classes=[name, "b"])
    result = cs.run(cs.settings.continual([source]), cs.methods.finetune(), training=cs.Training(epochs=1))
    page = Path(report.write([result], tmp_path / "r.html")).read_text()
    assert "\x1b" not in result.table() + page and "<script>alert" not in page
    assert quote("'=1+1") in page  # in the table for spreadsheets

    assert main(["run", "--data", f"no\x1b[31m{name}"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_tensor_whose_name_commands_a_terminal_is_refused(tmp_path):
    save_file({"a\x1b[2J": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ConsilienceError, match=r"must be printable, got 'a\\x1b"):
        opened(tmp_path / "x.safetensors")
