"""Descriptors, carried points and landmark embeddings: timm's own queries, keys and values, packed stores, exported encoders, openTSNE."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_reverse

from anatcxr.data.manifest import ChestXrays, shared_data
from anatcxr.data.packing import pack
from anatcxr.explain.carry import carry_points, grid_set, group_pairs, join_landmarks, landmark_groups, pck
from anatcxr.explain.correspondence import PixelPatches, describe, landmark_errors, summarise
from anatcxr.explain.descriptors import DescriptorError, descriptors, facet_tokens, log_bins, pixel_maps
from anatcxr.explain.landmark_embedding import Labelled, crop_embedding, embedding_scores, labelled, landmark_positions, tsne_map
from anatcxr.explain.landmarks import landmark_set, recrop, sample_crops
from anatcxr.models.backbones import Preprocess, create_backbone
from anatcxr.train.record import export_encoder, load_encoder

PARTS = ("query", "key", "value")
NARROW = dict(depth=3, embed_dim=48, num_heads=3)


def build(name: str, size: int, **kw):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = create_backbone(name, size, **kw).eval()
        for p in encoder.parameters(): p.data += .05 * torch.randn_like(p)  # biases are zero at the start
    return encoder


def rand(size: int, n: int = 2) -> torch.Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return pack("phantom:60", tmp_path_factory.mktemp("data") / "store", size=64, masks=False, workers=0)


@pytest.fixture
def people(store):
    return landmark_set(ChestXrays(store), n=20)


def attention_inputs(encoder, block: int, x: torch.Tensor) -> torch.Tensor:
    "What enters the attention of a block."
    seen = []
    hook = encoder.blocks[block].attn.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    with torch.no_grad(): encoder.tokens(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "micro_vit_nopos"])
def test_vit_parts_are_the_projections_without_prefix_tokens(name):
    encoder, x = build(name, 64), rand(64)
    attn = encoder.blocks[1].attn
    with torch.no_grad(): q, k, v = attn.qkv(attention_inputs(encoder, 1, x))[:, encoder.model.num_prefix_tokens:].chunk(3, -1)
    for part, want in zip(PARTS, (q, k, v)):
        with torch.no_grad(): got = facet_tokens(encoder, x, part, [1])[0]
        assert got.shape == (2, 16, encoder.dim)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_beit_parts_have_their_own_biases():
    encoder, x = build("beit_base_patch16_224", 64, **NARROW), rand(64)
    attn = encoder.blocks[1].attn
    bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    with torch.no_grad(): parts = F.linear(attention_inputs(encoder, 1, x), attn.qkv.weight, bias)[:, 1:].chunk(3, -1)
    assert attn.q_bias.abs().sum() > 0 and attn.qkv.bias is None
    for part, want in zip(PARTS, parts):
        with torch.no_grad(): torch.testing.assert_close(facet_tokens(encoder, x, part, [1])[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [112, 80])  # 80: a grid of 10 is filled up to 14, two windows of 7
@pytest.mark.parametrize("block", [0, 1])    # 1: windows moved by half a window
def test_swin_keys_are_those_inside_the_windows(size, block):
    encoder, x = build("micro_swin", size), rand(size)
    b, h = encoder.blocks[block], size // 8
    with torch.no_grad():
        keys = b.attn.qkv(attention_inputs(encoder, block, x)).chunk(3, -1)[1]
        full = -(-h // 7) * 7
        grid = window_reverse(keys.view(-1, 7, 7, keys.shape[-1]), (7, 7), full, full)[:, :h, :h]
        want = torch.roll(grid, b.shift_size, (1, 2)).flatten(1, 2)
        torch.testing.assert_close(facet_tokens(encoder, x, "key", [block])[0], want, atol=1e-5, rtol=1e-5)
    assert any(b.shift_size) == bool(block)


@pytest.mark.parametrize("name", ["micro_vit", "micro_vit_nopos", "micro_swin", "swin_tiny_patch4_window7_224", "resnet18"])
def test_dense_maps_hold_the_plain_ones(name):
    size = 224 if "tiny" in name else 112 if "micro" in name else 64
    encoder, x = build(name, size), rand(size, 1)
    block = 3 if "swin_tiny" in name else 1
    plain, dense = (descriptors(encoder, x, lambda x: x, [block], stride=s) for s in (None, 4))
    k = dense.maps[0].shape[-1] // plain.maps[0].shape[-1]
    assert k > 1 or name in ("micro_swin", "resnet18")
    assert torch.equal(dense.maps[0][..., k // 2::k, k // 2::k], plain.maps[0])
    patch = size // plain.maps[0].shape[-1]
    centres = ((torch.arange(2, size // patch - 2 if size // patch > 4 else size // patch) + .5) * patch - .5)[None, :, None].expand(-1, -1, 2)
    torch.testing.assert_close(dense.at(centres), plain.at(centres), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain.at(centres), describe(encoder, x, lambda x: x, [block]).at(centres), atol=1e-5, rtol=1e-5)


def test_training_mode_and_hooks_are_left_as_they_were():
    encoder = build("micro_vit", 112).train()
    with pytest.raises(DescriptorError, match="stride=5"): descriptors(encoder, rand(112), lambda x: x, facet="key", stride=5)
    assert encoder.training and not any(m._forward_hooks for m in encoder.modules())
    descriptors(encoder, rand(112), lambda x: x, facet="key")
    assert encoder.training and not any(m._forward_hooks for m in encoder.modules())


def test_moving_an_image_by_a_patch_moves_dense_descriptors():
    "A network without position: away from the borders, content found by another run has the same descriptor."
    encoder = build("resnet18", 128)  # 4 px patches in the first block, receptive field far smaller than the image
    x = rand(128, 1)
    f = lambda x: descriptors(encoder, x, lambda x: x, [0], stride=2).maps[0]
    a, b = f(x), f(x.roll((-2, -2), (2, 3)))
    torch.testing.assert_close(a[..., 20:40, 20:40], b[..., 19:39, 19:39], atol=1e-4, rtol=1e-4)


def test_an_exported_encoder_gives_the_same_table(people, tmp_path):
    encoder, pre = build("micro_swin", 112), Preprocess(112)
    export_encoder(tmp_path / "e.safetensors", encoder, pre, dict(backbone="micro_swin"))
    loaded, pre = load_encoder(tmp_path / "e.safetensors")
    views = recrop(people, 112, sample_crops(people.ids, people.size, .7, .7))
    sex = ChestXrays("phantom:60", 64).table.set_index("id").sex
    pairs, tables = group_pairs(views, sex, 2), []
    for e in (encoder, loaded):
        maps = log_bins(descriptors(e, views.images, pre.normalise, [3], "key", 8))
        errors = landmark_errors({"keys": maps, "pixels": log_bins(pixel_maps(views.images))}, views, pairs, "cropped", cells=28)
        tables.append((summarise(errors, ["pixels"]), pck(errors, minus=["position"]), landmark_groups(errors, sex, ["position"])))
    for a, b in zip(*tables): assert a.equals(b)
    groups = tables[0][2]
    assert {"within", "across", "across - within", "F → M", "M → F"} <= set(groups.pairs)
    gap = groups.query("pairs == 'across - within' and method == 'position'")
    assert len(gap) == 1 and gap["minus position"].abs().item() < 1e-9


def test_store_and_phantoms_give_the_same_sets(store):
    packed, drawn = grid_set(ChestXrays(store), 5), grid_set(ChestXrays("phantom:60", 64), 5)
    assert packed.keys == drawn.keys and torch.equal(packed.points, drawn.points)
    assert (packed.images - drawn.images).abs().max() < 1 / 255
    own = torch.arange(5)[:, None].expand(-1, 2)
    a, b = (recrop(packed, 64, sample_crops(packed.ids, 64, .7, .7, s)) for s in (0, 1))
    e = landmark_errors({"pixels": (PixelPatches(a.images, 16), PixelPatches(b.images, 16))}, a, own, "two crops", b, cells=64)
    error = e.groupby("method").error_pct.median()
    assert error["pixels"] < 3 < error["position"]


def test_points_are_carried_alike_whatever_else_is_in_the_set(people):
    x = recrop(people, 64).images
    a, b = carry_points(PixelPatches(x, 16), [0, 1, 2], 5, 32), carry_points(PixelPatches(x[:3], 16), [0, 1, 2], 5, 32)
    assert torch.equal(a, b) and a.shape == (3, 5, 2)
    swapped = carry_points(PixelPatches(x[[3, 0, 4, 1, 2]], 16), [1, 3, 4], 5, 32)
    assert torch.equal(a, swapped)


def test_crops_separate_landmarks_and_shuffled_names_do_not(people):
    encoder = build("micro_vit", 64)
    names = people.names[:4]
    four = type(people)(people.images, people.points[:, :4], names, people.ids, people.keys, people.patients)
    x = crop_embedding(encoder, four, Preprocess(64).normalise)
    g = np.random.default_rng(0)
    shuffled = Labelled(x.x[g.permutation(len(x))], x.labels, x.patients)
    s = embedding_scores({"crops": x, "coordinates": landmark_positions(four), "shuffled": shuffled}, minus=["shuffled"], k=5, n=200).set_index(["method", "score"])
    assert (s.value["coordinates"] > .8).all()
    assert s["minus shuffled, low"]["crops", "accuracy"] > 0 and abs(s.value["shuffled", "accuracy"] - .25) < .2
    assert s.patients.eq(20).all() and s.rows.eq(len(x)).all()


def test_rows_of_a_patient_do_not_vouch_for_each_other():
    "Two labels drawn by patient: features that only say who it is score chance, although every row has a twin."
    g = np.random.default_rng(1)
    who, x = np.repeat(np.arange(60), 2), np.repeat(g.normal(size=(60, 16)), 2, 0)
    label = np.repeat(g.permutation(np.repeat(["a", "b"], 30)), 2)
    s = embedding_scores({"who": Labelled(x, label, who)}, k=5, n=100).set_index("score").value
    assert abs(s["purity"] - .5) < .12 and abs(s["accuracy"] - .5) < .2


def test_another_tsne_fits_in():
    engine = pytest.importorskip("openTSNE.sklearn", reason="needs openTSNE").TSNE
    x = np.concatenate([np.random.default_rng(i).normal(5 * i, 1, (40, 8)) for i in range(2)])
    y = tsne_map(x, 10, "auto", engine=engine)
    assert y.shape == (80, 2)
    s = embedding_scores({"map": Labelled(y - y.mean(0), np.repeat(["a", "b"], 40), np.arange(80))}, k=5, n=50)
    assert s.set_index("score").value["purity"] > .95


@pytest.mark.skipif(shared_data() is None, reason="shared data absent")
def test_lungs_of_two_sources_are_numbered_alike():
    sets = [landmark_set(ChestXrays(shared_data() / "manifest.csv", 64, "squash", rows=f"source == '{s}'"), 30, 1000) for s in ("jsrt", "shenzhen")]
    both = join_landmarks(*sets, limit=1000)
    assert both.names == [f"RL{i}" for i in range(44)] + [f"LL{i}" for i in range(50)] and len(both) == 60
    points = both.points.numpy()[np.isfinite(both.points.numpy()).all((1, 2))]
    lowest = points[:, :44, 1].argmax(1), points[:, 44:, 1].argmax(1)
    for low in lowest: assert (low == 21).mean() > .9  # the costophrenic angle has one number in both
    maps = pixel_maps(both.images, 8)
    x = labelled(maps.at(both.points.nan_to_num()), both)
    assert len(x) == int(both.points.isfinite().all(-1).sum())
