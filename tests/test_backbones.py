"""Every family of backbones through everything that takes one, and labels as a start for what comes after."""
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from anatcxr.data.manifest import ChestXrays
from anatcxr.data.packing import pack
from anatcxr.downstream.classify_config import FinetuneConfig
from anatcxr.downstream.finetune import finetune
from anatcxr.downstream.probe import extract
from anatcxr.downstream.segment import segment
from anatcxr.downstream.segment_settings import SegmentConfig
from anatcxr.methods.afire import AFiReConfig
from anatcxr.methods.peac import PEACConfig, PEACError
from anatcxr.models.backbones import Preprocess, create_backbone
from anatcxr.models.checkpoints import CheckpointMismatch, initial_encoder
from anatcxr.train.config import PretrainPEAC
from anatcxr.train.pretrain import pretrain
from anatcxr.train.record import load_encoder, read_record, state_hash

BEIT = dict(depth=2, embed_dim=48, num_heads=3)
FAMILIES = [("micro_vit", 64, {}), ("micro_swin", 64, {}), ("resnet10t", 64, {}), ("beit_base_patch16_224", 64, BEIT)]


def plain(encoder, x: torch.Tensor) -> torch.Tensor:
    "The tokens by timm alone."
    t = encoder.model.forward_features(x.expand(-1, 3, -1, -1))
    return t.flatten(2).mT if isinstance(encoder.model, timm.models.ResNet) else t.flatten(1, 2) if t.ndim == 4 else t[:, 1:]


@pytest.mark.parametrize("name, size, kw", FAMILIES)
@torch.no_grad()
def test_tokens_are_those_of_timm_and_features_are_finite(name, size, kw):
    encoder = create_backbone(name, size, **kw).eval()
    x = torch.randn(3, 1, size, size)
    assert torch.equal(encoder.tokens(x), plain(encoder, x)) and encoder.tokens(x).shape == (3, encoder.grid[0] * encoder.grid[1], encoder.dim)
    assert len(encoder.block_tokens(x)) == len(encoder.blocks)
    films = ChestXrays("phantom:4", size)
    assert extract(encoder, films, Preprocess(size).normalise).shape == (4, encoder.dim)
    assert extract(encoder, films, Preprocess(size).normalise, block=0).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("init, full, size, kw", [
    ("imagenet", "resnet50.tv_in1k", 224, {}), ("timm:resnet18.a1_in1k", "resnet18.a1_in1k", 96, {}), ("beit", "beit_base_patch16_224.in22k_ft_in22k", 224, BEIT),
    ("imagenet", "swin_base_patch4_window7_224.ms_in1k", 224, dict(depths=(1, 1, 1, 1), embed_dim=32)), ("dino", "vit_base_patch16_224.dino", 224, dict(depth=2))])
def test_weights_in_a_folder_give_the_features_of_plain_timm(init, full, size, kw, tmp_path):
    "As FOLDER/name.tag.safetensors, with the classifier that the hub's file has; then without one tensor, and under another name."
    name, cfg = full.split(".")[0], timm.models.get_pretrained_cfg(full)
    image = {} if name.startswith("resnet") else dict(img_size=size)  # BEiT's default in timm is the mean, as its weights want it
    sent = timm.create_model(name, num_classes=cfg.num_classes, **kw)
    for p in sent.parameters(): p.add_(.05 * torch.randn_like(p))
    for k, b in sent.named_buffers():
        if "running" in k: b.add_(torch.rand_like(b))
    state = {k: v.clone() for k, v in sent.state_dict().items()}
    save_file(state, tmp_path / f"{full}.safetensors")
    encoder, preprocess = initial_encoder(init, name, size, cache=tmp_path, **kw)
    same = timm.create_model(name, num_classes=cfg.num_classes, **image, **kw).eval()
    same.load_state_dict(state)
    x = torch.randn(2, 3, size, size)
    expected = same.forward_features(x)
    expected = expected.flatten(2).mT if encoder.is_resnet else expected.flatten(1, 2) if encoder.is_swin else expected[:, 1:]
    assert (encoder.tokens(x) - expected).abs().max() < 1e-5 and expected.std() > .01
    assert (preprocess.size, preprocess.mean, preprocess.std) == (size, tuple(cfg.mean), tuple(cfg.std)) and encoder.name == name
    gone = next(k for k in state if k.endswith("weight") and "head" not in k and not k.startswith("fc."))
    save_file({k: v for k, v in state.items() if k != gone}, tmp_path / f"{full}.safetensors")
    with pytest.raises(CheckpointMismatch, match="tensors missing"): initial_encoder(init, name, size, cache=tmp_path, **kw)


@pytest.mark.parametrize("backbone, m, kw", [("resnet10t", 32, {}), ("beit_base_patch16_224", 16, {})])
def test_both_methods_take_them(backbone, m, kw, monkeypatch):
    "PEAC where the token is as large as the patch, AFiRe where the image is a multiple of the token; else both say what to set."
    from anatcxr.methods import afire, peac
    for module in (peac, afire):
        monkeypatch.setattr(module, "create_backbone", lambda *a, **k: create_backbone(*a, **k, **(BEIT if "beit" in backbone else {})))
    ids = torch.arange(4)
    for method, side in ((PEACConfig(backbone=backbone, n=4, m=m, k=2, mlp_global="16-16-16", mlp_local="16-16-16", drop_path=0.).build(), 4 * m),
                         (AFiReConfig(backbone=backbone, size=64, K=32, head_hidden=32, head_dim=16, dec_depth=1, dec_dim=32, dec_heads=4).build(), 64)):
        losses = method.train()(method.views(torch.rand(4, 1, side, side), ids, 0))
        sum(losses.values()).backward()
        assert all(torch.isfinite(v) for v in losses.values()) and next(method.student.backbone.parameters()).grad.abs().sum() > 0
        method.after_step(.5)
        assert all(torch.isfinite(torch.tensor(v)) or k == "brightness_r2_local" for k, v in method.sentinels(method.views(torch.rand(4, 1, side, side), ids, 1)).items() if v == v)
    with pytest.raises(PEACError, match=f"so set m={m}"): PEACConfig(backbone=backbone, n=4, m=m * 2, k=2, mlp_global="16-16-16", mlp_local="16-16-16").build()


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    return pack("phantom:90", tmp_path_factory.mktemp("data") / "films", size=73, workers=0)


def config(films: Path, out: Path, **settings) -> FinetuneConfig:
    return FinetuneConfig.preset("smoke", **{**dict(data=str(films), out=str(out), task="binary", label_column="sex", normal_label="F", steps=3, eval_every=3, bootstrap=10, device="cpu", progress=False), **settings})


@pytest.mark.parametrize("name", ["resnet50", "resnet10t"])
def test_a_resnet_is_fine_tuned_and_goes_on(films, tmp_path, name):
    "With drop-path and layer decay; the statistics of batch norm are in the checkpoint and in the encoder that is left."
    cfg = config(films, tmp_path / "run", backbone=name, drop_path=.1, layer_decay=.8, batch_size=8, save_every=1, size=64)
    run = finetune(cfg)
    assert read_record(run.record).method == "scratch" and run.predictions.p_M.between(0, 1).all()
    encoder, _ = load_encoder(run.folder / "encoder_student.safetensors")
    stats = [(k, v) for k, v in encoder.state_dict().items() if k.endswith("running_mean")]
    assert stats and all(v.abs().sum() > 0 for _, v in stats)
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad(): assert torch.equal(encoder.tokens(x), run.model.encoder.eval().tokens(x))
    if name == "resnet50": return
    def stop(step, model):
        if step == 2: raise KeyboardInterrupt
    cut = config(films, tmp_path / "cut", **{k: getattr(cfg, k) for k in ("backbone", "drop_path", "layer_decay", "batch_size", "save_every", "size")})
    with pytest.raises(KeyboardInterrupt): finetune(cut, stop)
    assert read_record(finetune(cut).record).weights_hash == read_record(run.record).weights_hash


def test_labels_are_a_start_like_any_other(films, tmp_path):
    "Fine-tuned from scratch, then for another question and for segmentation from there; tokens equal, names say where they come from."
    first = finetune(config(films, tmp_path / "labels", backbone="micro_vit", size=64, norm="maco", steps=6, eval_every=2, seed=3))
    encoder, preprocess = initial_encoder(f"run:{first.folder}")
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad(): assert torch.equal(encoder.tokens(x), first.model.encoder.tokens(x))
    assert preprocess == first.model.preprocess and preprocess.mean == .4978
    start = state_hash(encoder.state_dict())
    after = finetune(config(films, tmp_path / "after", init=f"run:{first.folder}", backbone=None, size=None, label_column="label", normal_label="normal"))
    record = read_record(after.record)
    assert (record.method, record.flags["start_hash"]) == ("supervised", start) and after.model.preprocess == preprocess
    third = finetune(config(films, tmp_path / "third", init=str(after.folder / "encoder_student.safetensors"), backbone=None, size=None))
    assert read_record(third.record).method == "supervised+supervised"
    organs = segment(SegmentConfig(data="phantom:90", init=f"run:{first.folder}", backbone="micro_vit", size=64, steps=2, warmup=0., channels=16, bootstrap=10, out=str(tmp_path / "lungs"), device="cpu", progress=False))
    record = read_record(organs.folder)
    assert record.method == "supervised" and start[:16] in record.data_hash
    with pytest.raises(ValueError, match="holds the weights to start from"): finetune(config(films, tmp_path / "labels", init=f"run:{first.folder}"))


def test_a_run_without_its_encoder_makes_it_again(films, tmp_path):
    "Runs of before had none: nothing is trained, the encoder and the report are written."
    cfg = config(films, tmp_path / "run", backbone="micro_vit", size=64)
    run = finetune(cfg)
    whole = (run.folder / "encoder_student.safetensors").read_bytes()
    (run.folder / "encoder_student.safetensors").unlink()
    def computed(step, model): raise AssertionError("a finished run goes on")
    again = finetune(cfg, computed)
    assert (again.folder / "encoder_student.safetensors").read_bytes() == whole and read_record(again.record).metrics == read_record(run.record).metrics


def test_a_method_and_then_labels(films, tmp_path):
    "PEAC, then labels: the encoder is the one that learnt from them, and the name says both."
    data = pack("phantom:40", tmp_path / "films", size=96, workers=0)
    peac = pretrain(PretrainPEAC(data=str(data), out=str(tmp_path / "peac"), backbone="micro_vit", n=6, m=16, k=4, mlp_global="16-16-16", mlp_local="16-16-16", steps=1, batch_size=8, progress=False, device="cpu"))
    labels = finetune(config(films, tmp_path / "labels", init=str(peac.folder), backbone=None, size=None))
    assert read_record(labels.record).method == "peac"
    end = finetune(config(films, tmp_path / "end", init=str(labels.folder), backbone=None, size=None))
    assert read_record(end.record).method == "peac+supervised"
    assert read_record(end.record).flags["start_hash"] == state_hash(load_encoder(labels.folder / "encoder_student.safetensors")[0].state_dict())


@pytest.mark.parametrize("name", ["resnet10t", "micro_swin"])
def test_segmentation_takes_them(name, tmp_path):
    run = segment(SegmentConfig(data="phantom:90", backbone=name, size=64, steps=2, warmup=0., layer_decay=.7, channels=16, bootstrap=10, out=str(tmp_path / "run"), device="cpu", progress=False))
    assert run.cases.dice.between(0, 1).all() and run.model.encoder.name == name
