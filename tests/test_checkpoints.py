"""Released files at their real size, name by name, against independent Swins and ViTs; and encoders that our own runs export."""
import argparse
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torchvision.models.swin_transformer import SwinTransformer

from anatcxr.models import checkpoints
from anatcxr.models.backbones import Preprocess, create_backbone
from anatcxr.models.checkpoints import (
    INITIALISATIONS, CheckpointMismatch, InitialisationError, ReleasedDecoder, initial_encoder, load_official,
    official_decoder, official_dropped, official_to_timm, timm_to_official)
from anatcxr.train.record import Record, export_encoder, load_encoder, write_record
from notebooks import ROOT

SWIN, VIT = "swin_base_patch4_window7_224", "vit_base_patch16_224"
REFERENCE = ROOT.parent / "shared" / "reference" / "official_keys.json"


def linear(name: str, o: int, i: int, bias: bool = True) -> dict:
    return {f"{name}.weight": (o, i)} | ({f"{name}.bias": (o,)} if bias else {})


def norm(name: str, n: int) -> dict:
    return {f"{name}.weight": (n,), f"{name}.bias": (n,)}


def block(name: str, d: int) -> dict:
    return norm(f"{name}.norm1", d) | norm(f"{name}.norm2", d) | linear(f"{name}.attn.qkv", 3 * d, d) | linear(f"{name}.attn.proj", d, d) \
        | linear(f"{name}.mlp.fc1", 4 * d, d) | linear(f"{name}.mlp.fc2", d, 4 * d)


def peac_shapes() -> dict:
    "Names and shapes of the entry 'student' of PEAC's file, from its architecture."
    s = "swin_model."
    out = {"bias": (196,), s + "patch_embed.proj.weight": (128, 3, 4, 4), s + "patch_embed.proj.bias": (128,)} | norm(s + "patch_embed.norm", 128)
    for i, depth in enumerate((2, 2, 18, 2)):
        d, windows = 128 * 2 ** i, (448 // 4 // 2 ** i // 7) ** 2
        for j in range(depth):
            b = f"{s}layers.{i}.blocks.{j}"
            out |= block(b, d) | {f"{b}.attn.relative_position_bias_table": (169, 4 * 2 ** i), f"{b}.attn.relative_position_index": (49, 49)}
            if j % 2: out[f"{b}.attn_mask"] = (windows, 49, 49)
        if i < 3: out |= linear(f"{s}layers.{i}.downsample.reduction", 2 * d, 4 * d, False) | norm(f"{s}layers.{i}.downsample.norm", 4 * d)
    out |= norm(s + "norm", 1024) | linear("head", 196, 1024) | {"decoder.0.weight": (3072, 1024, 1, 1), "decoder.0.bias": (3072,)}
    for mlp, n in (("mlp", 8192), ("mlp_local", 512)):
        out |= linear(f"{mlp}.0", n, 1024) | norm(f"{mlp}.1", n) | linear(f"{mlp}.3", n, n) | norm(f"{mlp}.4", n) | linear(f"{mlp}.6", n, n, False)
    return out


def afire_shapes(student: bool) -> dict:
    "Names and shapes of an entry of AFiRe's file, from its architecture."
    out = {"encoder.cls_token": (1, 1, 768), "encoder.pos_embed": (1, 197, 768), "encoder.patch_embed.proj.weight": (768, 3, 16, 16), "encoder.patch_embed.proj.bias": (768,)}
    for i in range(12): out |= block(f"encoder.blocks.{i}", 768)
    out |= norm("encoder.norm", 768)
    if student:
        out |= {"decoder.pos_embed": (1, 197, 512), "decoder.mask_token": (1, 196, 512)} | linear("decoder.embedding", 512, 768)
        for i in range(8): out |= block(f"decoder.blocks.{i}", 512)
        out |= norm("decoder.norm", 512) | linear("decoder.image_pred", 768, 512)
    out |= linear("head.mlp.0", 1024, 768) | linear("head.mlp.2", 1024, 1024) | linear("head.mlp.4", 256, 1024)
    for i in range(196): out |= {f"head.last_layers.{i}.weight_g": (256, 1), f"head.last_layers.{i}.weight_v": (256, 256)}
    return out


SHAPES = {"peac_swin_b_448": peac_shapes(), "afire_vit_b_16_teacher": afire_shapes(False), "afire_vit_b_16_student": afire_shapes(True)}
ENTRIES = [("peac", "peac_swin_b_448", SWIN, 448), ("afire", "afire_vit_b_16_teacher", VIT, 224), ("afire", "afire_vit_b_16_student", VIT, 224)]


def constant(shapes: dict) -> dict:
    "Tensors of these shapes with one number each, which take no memory."
    return {k: torch.randn(()).expand(s) for k, s in shapes.items()}


def random(shapes: dict) -> dict:
    "Tensors as if trained: norms about 1, everything else small."
    return {k: torch.randn(s) * .02 + ("norm" in k and k.endswith("weight")) for k, s in shapes.items()}


@pytest.mark.skipif(not REFERENCE.is_file(), reason="no list of the released names here")
def test_names_and_shapes_are_those_of_the_released_files():
    reference = json.loads(REFERENCE.read_text())
    for name, shapes in SHAPES.items(): assert {k: list(s) for k, s in shapes.items()} == reference[name], name


@pytest.mark.parametrize("kind, name, backbone, size", ENTRIES, ids=lambda x: str(x))
def test_every_name_is_mapped_or_left_out_for_a_reason(kind, name, backbone, size):
    state = constant(SHAPES[name])
    ours, left = official_to_timm(state, kind), official_dropped(state, kind)
    with torch.device("meta"): model = timm.create_model(backbone, img_size=size, num_classes=0)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert len(ours) + len(left) == len(state) and all(left.values())
    prefix = INITIALISATIONS[kind].prefixes[0]
    assert {k for k in left if k.startswith(prefix)} == {k for k in state if k.endswith(("attn_mask", "relative_position_index"))}
    back = timm_to_official(ours, kind)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items() if k.startswith(prefix)}
    assert all(back[k] is state[k] for k in back if k not in left)
    again = official_to_timm(back, kind)
    assert {*again} == {*ours} and all(again[k] is ours[k] for k in ours)
    assert {*official_to_timm({f"module.{k}": v for k, v in state.items()}, kind)} == {*ours}


def torchvision_names(state: dict) -> dict:
    "The official layout in torchvision's names, where merging is a layer between two stages."
    out = {}
    for k, v in state.items():
        if "attn_mask" in k: continue
        if "relative_position_index" in k: v = v.flatten()
        k = re.sub(r"layers\.(\d)\.blocks\.", lambda m: f"features.{2 * int(m[1]) + 1}.", k)
        k = re.sub(r"layers\.(\d)\.downsample\.", lambda m: f"features.{2 * int(m[1]) + 2}.", k)
        for a, b in (("patch_embed.proj", "features.0.0"), ("patch_embed.norm", "features.0.2"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3")): k = k.replace(a, b)
        out[k] = v
    return out


@torch.no_grad()
def test_peac_gives_the_features_of_an_independent_swin():
    "The full Swin-B at 448 px: torchvision's code with the tensors of the file (buffers too), and plain timm with the converted ones."
    shapes = {k: s for k, s in SHAPES["peac_swin_b_448"].items() if k.startswith("swin_model.") and not k.endswith(("attn_mask", "relative_position_index"))}
    ours = official_to_timm(random(shapes), "peac")
    file = {k.removeprefix("swin_model."): v for k, v in timm_to_official(ours, "peac").items()}
    x = torch.randn(1, 3, 448, 448)
    plain = timm.create_model(SWIN, img_size=448, num_classes=0).eval()
    plain.load_state_dict(ours)
    tokens = plain.forward_features(x)
    other = SwinTransformer([4, 4], 128, [2, 2, 18, 2], [4, 8, 16, 32], [7, 7]).eval()
    problems = other.load_state_dict(torchvision_names(file), strict=False)
    assert problems.missing_keys == ["head.weight", "head.bias"] and not problems.unexpected_keys
    expected = other.norm(other.features(x))
    assert tokens.shape == (1, 14, 14, 1024) and expected.std() > .1
    assert (tokens - expected).abs().max() < 1e-5
    # timm's masks of the shifted windows are not parameters, so they are compared with those for the file
    masks = {k: v for k, v in plain.named_buffers() if k.endswith("attn_mask")}
    assert len(masks) == 12 and all(torch.equal(v, file[k]) for k, v in masks.items())
    theirs = timm.models.swin_transformer.checkpoint_filter_fn(dict(file), plain)
    assert {*theirs} == {*ours} and all(torch.equal(theirs[k], v) for k, v in ours.items())


@torch.no_grad()
def test_afire_gives_the_features_of_the_released_encoder():
    "The full ViT-B: the released forward pass, written from the names of the file, and plain timm with the converted tensors."
    s = random({k: v for k, v in SHAPES["afire_vit_b_16_teacher"].items() if k.startswith("encoder.")})
    n = lambda x, k: F.layer_norm(x, (768,), s[f"encoder.{k}.weight"], s[f"encoder.{k}.bias"], 1e-6)
    f = lambda x, k: F.linear(x, s[f"encoder.{k}.weight"], s[f"encoder.{k}.bias"])
    images = torch.randn(2, 3, 224, 224)
    x = F.conv2d(images, s["encoder.patch_embed.proj.weight"], s["encoder.patch_embed.proj.bias"], stride=16).flatten(2).mT + s["encoder.pos_embed"][:, 1:]
    x = torch.cat([(s["encoder.cls_token"] + s["encoder.pos_embed"][:, :1]).expand(2, -1, -1), x], 1)
    for i in range(12):
        b = f"blocks.{i}."
        q, k, v = f(n(x, b + "norm1"), b + "attn.qkv").unflatten(-1, (3, 12, 64)).permute(2, 0, 3, 1, 4)
        x = x + f(((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2), b + "attn.proj")
        x = x + f(F.gelu(f(n(x, b + "norm2"), b + "mlp.fc1")), b + "mlp.fc2")
    plain = timm.create_model(VIT, num_classes=0).eval()
    plain.load_state_dict(official_to_timm(s, "afire"))
    assert (plain.forward_features(images) - n(x, "norm")).abs().max() < 1e-5


def released_file(folder: Path, kind: str, backbone: str, size: int, **more) -> tuple[Path, dict]:
    "A file like the released one with a small network in it; student and teacher differ."
    net = create_backbone(backbone, size).model
    entries = {who: {k: torch.randn_like(v) * .1 + (v.ndim == 1) for k, v in net.state_dict().items()} for who in ("student", "teacher")}
    content = {who: {f"module.{k}": v for k, v in timm_to_official(state, kind, size).items()} for who, state in entries.items()}
    for who in content:  # what tells AFiRe's file from others
        if kind == "afire": content[who]["module.head.last_layers.0.weight_v"] = torch.randn(4, 4)
    torch.save(content | dict(epoch=7, optimizer={}) | more, folder / f"{kind}.pth")
    return folder / f"{kind}.pth", entries


@pytest.mark.parametrize("kind, backbone, who", [("peac", "micro_swin", "student"), ("afire", "micro_vit", "teacher"), ("peac-3", "micro_vit", "student")])
@torch.no_grad()
def test_a_grey_image_is_what_the_repeated_one_is_to_plain_timm(tmp_path, kind, backbone, who):
    "The entry that is used downstream, its normalisation, and one channel made three."
    file, entries = released_file(tmp_path, kind, backbone, 112)
    encoder, preprocess, report = load_official(file, img_size=112, backbone=backbone)
    assert (report["kind"], report["entry"], report["epoch"], encoder.training) == (kind, who, 7, False)
    plain = create_backbone(backbone, 112).model.eval()
    plain.load_state_dict(entries[who])
    grey = torch.rand(2, 1, 112, 112)
    mean, std = ([.485, .456, .406], [.229, .224, .225]) if kind == "afire" else ([.5056] * 3, [.252] * 3)
    rgb = (grey.repeat(1, 3, 1, 1) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    expected = plain.forward_features(rgb)
    expected = expected.flatten(1, 2) if encoder.is_swin else expected[:, 1:]
    assert (encoder.tokens(preprocess.normalise(grey)) - expected).abs().max() < 1e-5
    assert (preprocess.size, preprocess.rule) == (112, "squash" if kind == "afire" else "crop")
    other, _, _ = load_official(file, entry={"student": "teacher", "teacher": "student"}[who], img_size=112, backbone=backbone)
    assert not torch.equal(other.tokens(grey), encoder.tokens(grey))


def test_settings_of_old_numpy_are_read_and_code_is_not(tmp_path):
    "The learning rates in both files are numpy numbers, pickled by numpy 1 under a module that has moved since."
    more = dict(args=argparse.Namespace(arch="vit_base", lr=5e-4), optimizer=dict(param_groups=[dict(lr=np.float64(.1), step=np.int64(3))]))
    file, _ = released_file(tmp_path, "afire", "micro_vit", 112, **more)
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(file) as a, zipfile.ZipFile(old, "w") as b:
        for item in a.infolist():
            data = a.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            b.writestr(item, data)
    for f in (file, old): assert load_official(f, img_size=112, backbone="micro_vit")[2]["entry"] == "teacher"
    torch.save(dict(model={"w": torch.zeros(1)}, config=Path("x")), tmp_path / "code.pth")
    with pytest.raises(CheckpointMismatch, match="pathlib.*, which could run code.*save its tensors alone"): load_official(tmp_path / "code.pth", "peac")


def test_position_codes_are_resized_as_timm_does(tmp_path):
    "14x14 to 7x7 and back, through a released file and through timm's own loader."
    file, entries = released_file(tmp_path, "afire", "micro_vit", 224)
    encoder, _, _ = load_official(file, img_size=112, backbone="micro_vit")
    state = entries["teacher"]
    expected = timm.layers.resample_abs_pos_embed(state["pos_embed"], [7, 7], num_prefix_tokens=1)
    assert encoder.model.pos_embed.shape == (1, 50, 96) and torch.equal(encoder.model.pos_embed, expected)
    assert torch.equal(encoder.model.pos_embed[:, 0], state["pos_embed"][:, 0])  # the class token's stays


WRONG = {
    "AFiRe as PEAC": (lambda f: f["afire"], "peac", "27 of .* missing.*looks like the file of AFiRe"),
    "PEAC as AFiRe": (lambda f: f["peac"], "afire", "looks like the file of PEAC"),
    "ViT file as PEAC": (lambda f: f["vit"], "peac", "looks like a ViT alone"),
    "exported encoder as PEAC-3": (lambda f: f["run"], "peac-3", "looks like an encoder exported by this package"),
    "MoCo v3 as AFiRe": (lambda f: f["moco"], "afire", "looks like the file of MoCo v3"),
    "DINO run as PEAC-3": (lambda f: f["dino"], "peac-3", "looks like the file of DINO"),
    "nothing": (lambda f: f["empty"], "peac", "no such entry"),
    "unknown": (lambda f: f["vit"], None, "say which of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named(tmp_path, case):
    vit = create_backbone("micro_vit", 112).model.state_dict()
    contents = {
        "vit": vit, "run": {f"model.{k}": v for k, v in vit.items()}, "empty": {"epoch": 3},
        "moco": dict(state_dict={f"module.{who}_encoder.{k}": v for who in ("base", "momentum") for k, v in vit.items()}),
        "dino": dict(student={f"backbone.{k}": v for k, v in vit.items()} | {"head.last_layer.weight_g": torch.ones(1)}),
    }
    files = {kind: released_file(tmp_path, kind, b, 112)[0] for kind, b in (("peac", "micro_swin"), ("afire", "micro_vit"))}
    for name, content in contents.items(): torch.save(content, tmp_path / f"{name}.pth"); files[name] = tmp_path / f"{name}.pth"
    file, which, text = WRONG[case]
    backbone = "micro_swin" if which == "peac" else "micro_vit"
    with pytest.raises(CheckpointMismatch, match=text.replace("27", r"\d+")) as e: load_official(file(files), which, img_size=112, backbone=backbone)
    assert str(file(files)) in str(e.value)


def test_the_released_decoder_is_complete(tmp_path):
    "All names of the released student's decoder are those of our decoder and the code of the positions."
    part = {k.removeprefix("decoder."): s for k, s in SHAPES["afire_vit_b_16_student"].items() if k.startswith("decoder.")}
    with torch.device("meta"): ours = {k: tuple(v.shape) for k, v in ReleasedDecoder().state_dict().items()}
    renamed = {k.replace("embedding", "embed").replace("image_pred", "head"): s for k, s in part.items() if k != "pos_embed"}
    assert renamed == ours
    state = constant(SHAPES["afire_vit_b_16_student"]) | {"decoder.pos_embed": torch.cat([torch.zeros(1, 1, 512), ReleasedDecoder().pos_embed], 1)}
    torch.save(dict(student={f"module.{k}": v for k, v in state.items()}), tmp_path / "afire.pth")
    decoder = official_decoder(tmp_path / "afire.pth")
    assert not decoder.training and torch.equal(decoder.head.bias, state["decoder.image_pred.bias"])
    encoder, _, report = load_official(tmp_path / "afire.pth", "afire", "student")
    assert report["dropped"] == {"token head": 398, "decoder": 104}
    with torch.no_grad(): tokens = encoder.model.forward_features(torch.zeros(1, 3, 224, 224))
    assert decoder(tokens, torch.zeros(1, 196).bool()).shape == (1, 196, 768)


@torch.no_grad()
def test_a_start_from_an_exported_run_is_that_encoder(tmp_path):
    "What train.record exports is read without train: same tokens, same preprocessing but for the size, which is the encoder's."
    x = torch.rand(2, 1, 112, 112)
    for who in ("student", "teacher"):
        export_encoder(tmp_path / f"encoder_{who}.safetensors", create_backbone("micro_vit", 112), Preprocess(152, "squash", (.4, .5, .6), (.1, .2, .3)), dict(backbone="micro_vit"))
    for method, who in (("peac", "student"), ("afire", "teacher")):
        write_record(tmp_path, Record("pretrain", method, "smoke", 0, "phantom:8", "d", "s", "p"))
        expected, how = load_encoder(tmp_path / f"encoder_{who}.safetensors")
        encoder, preprocess = initial_encoder(f"run:{tmp_path}")
        assert torch.equal(encoder.tokens(x), expected.tokens(x)) and not encoder.training
        assert preprocess == Preprocess(112, "squash", (.4, .5, .6), (.1, .2, .3)) and how.size == 152
    large, preprocess = initial_encoder(f"run:{tmp_path}", "micro_vit", 224, drop_path=.2)
    assert large.grid == (14, 14) and preprocess.size == 224 and large.model.blocks[-1].drop_path1.drop_prob > .19
    (tmp_path / "encoder_teacher.safetensors").unlink()  # restoration alone has no teacher
    with pytest.raises(CheckpointMismatch, match="name the file itself"): initial_encoder(f"run:{tmp_path}")
    assert initial_encoder(f"run:{tmp_path / 'encoder_student.safetensors'}")[0].dim == 96


def test_without_the_hub_the_message_says_what_to_do(tmp_path):
    "The real client in its offline mode, in a process of its own."
    code = f"""
from anatcxr.models.checkpoints import InitialisationError, initial_encoder
try: initial_encoder("dino", "vit_base_patch16_224", cache={str(tmp_path)!r})
except InitialisationError as e: print(e)
"""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    assert "huggingface.co/timm/vit_base_patch16_224.dino" in said and "FOLDER/vit_base_patch16_224.dino.safetensors" in said


@torch.no_grad()
def test_weights_from_the_hub_are_all_there_or_refused(tmp_path, monkeypatch):
    "What the hub would send, here made by timm: equal to timm's own loading; a part of it is an error, as is a file put there that is something else."
    name = "swin_tiny_patch4_window7_224"
    sent = {k: torch.randn_like(v) * .05 for k, v in timm.create_model(name, num_classes=1000).state_dict().items()}
    monkeypatch.setattr(checkpoints, "load_state_dict_from_hf", lambda *a, **kw: dict(sent))
    encoder, preprocess = initial_encoder(f"timm:{name}.ms_in1k", rule="squash")
    plain = timm.create_model(name, num_classes=1000).eval()
    plain.load_state_dict(sent)
    x = torch.randn(1, 3, 224, 224)
    assert torch.allclose(encoder.tokens(x), plain.forward_features(x).flatten(1, 2), atol=1e-5)
    assert preprocess == Preprocess(224, "squash", (.485, .456, .406), (.229, .224, .225))
    del sent["layers.3.blocks.1.norm2.bias"]
    with pytest.raises(CheckpointMismatch, match="1 of 171 tensors missing: layers.3.blocks.1.norm2.bias"): initial_encoder(f"timm:{name}.ms_in1k")
    torch.save(create_backbone("micro_vit", 112).model.state_dict(), tmp_path / f"{name}.ms_in1k.pth")
    with pytest.raises(CheckpointMismatch, match="missing"): initial_encoder(f"timm:{name}.ms_in1k", cache=tmp_path)


def test_every_tag_is_in_the_registry_and_no_name_is_left_without_a_way():
    known = {*timm.list_pretrained()}
    for name, i in INITIALISATIONS.items():
        for backbone, tag in i.tags.items():
            cfg = timm.models.get_pretrained_cfg(f"{backbone}.{tag}")
            assert f"{backbone}.{tag}" in known and cfg.hf_hub_id and len(cfg.mean) == len(cfg.std) == 3
    for name in ("moco_v3", "simmim"):
        with pytest.raises(InitialisationError, match=f"name a file of .*{name}=FILE"): initial_encoder(name)
    with pytest.raises(InitialisationError, match="or a backbone of"): initial_encoder("dino", SWIN)
    with pytest.raises(InitialisationError, match=r"did you mean \['simmim'\]"): initial_encoder("simmin=x.pth")
