"""Grad-CAM: equal to the package of that name; numbers on boxes against scikit-learn; weights randomised in order, the model untouched."""
import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from anatcxr.downstream.classifier import Classifier
from anatcxr.downstream.intervals import bootstrap_ci
from anatcxr.explain.gradcam import (
    GradCamError, _parts, box_controls, box_scores, full_maps, grad_cam, image_box_scores, position_maps, randomisation_check, randomised_maps)
from anatcxr.models.backbones import Preprocess, create_backbone
from anatcxr.train.pretrain import addressed_torch

MODELS = {"micro_vit": 64, "micro_swin": 112, "vit_tiny_patch16_224": 224, "swin_tiny_patch4_window7_224": 224, "resnet18": 96}


def classifier(name: str, outputs: int = 3, head_std: float = 1.) -> Classifier:
    "A large head, since the package adds 1e-7 to the maximum before it divides."
    side = MODELS[name]
    with addressed_torch(0, 0, "weights"): return Classifier(create_backbone(name, side), Preprocess(side), outputs, head_std).eval()


def random_images(side: int, n: int = 3, channels: int = 3) -> torch.Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0))


def sequence_to_map(x):  # (B,1+h*w,D) -> (B,D,h,w)
    side = int((x.shape[1] - 1) ** .5)
    return x[:, 1:].reshape(len(x), side, side, -1).permute(0, 3, 1, 2)


def last_to_first(x): return x.permute(0, 3, 1, 2)  # (B,h,w,D) -> (B,D,h,w)


@pytest.mark.parametrize("layer", ["norm", "norm1", -1, 0])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_grad_cam_package(name, layer):
    package = pytest.importorskip("pytorch_grad_cam", reason="the package grad-cam (extra 'dev') is not installed")
    model, x = classifier(name), random_images(MODELS[name])
    m = model.encoder.model
    if name == "resnet18" and layer == "norm1": pytest.skip("a ResNet's blocks have no norm1")
    module = {"norm": getattr(m, "norm", model.encoder.blocks[-1]), "norm1": getattr(model.encoder.blocks[-1], "norm1", None)}.get(layer) \
        or model.encoder.blocks[layer]
    reshape = None if name == "resnet18" else last_to_first if "swin" in name else sequence_to_map
    with package.GradCAM(model=model, target_layers=[module], reshape_transform=reshape) as theirs:
        scaled = theirs(input_tensor=x, targets=None)  # the highest logit
        a, g = (v[0].numpy() for v in (theirs.activations_and_grads.activations, theirs.activations_and_grads.gradients))
        raw = theirs.get_cam_image(x, module, None, a, g)  # neither rectified nor scaled
    assert raw.std() > 1e-3 and scaled.std() > .01  # there is something to compare
    np.testing.assert_allclose(grad_cam(model, x, layer=layer, relu=False), raw, atol=1e-4 * np.abs(raw).max(), rtol=0)
    ours = grad_cam(model, x, layer=layer, batch_size=2)
    np.testing.assert_allclose(ours, np.maximum(raw, 0), atol=1e-4, rtol=0)
    np.testing.assert_allclose(full_maps(ours, MODELS[name]), scaled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["micro_vit", "micro_swin"])
def test_equals_the_grad_cam_package_for_a_class_of_each_image(name):
    package = pytest.importorskip("pytorch_grad_cam", reason="the package grad-cam (extra 'dev') is not installed")
    target = pytest.importorskip("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    model, x, classes = classifier(name), random_images(MODELS[name]), torch.tensor([2, 0, 1])
    with package.GradCAM(model=model, target_layers=[model.encoder.blocks[-1]],
                         reshape_transform=last_to_first if "swin" in name else sequence_to_map) as theirs:
        scaled = theirs(input_tensor=x, targets=[target(int(c)) for c in classes])
    np.testing.assert_allclose(full_maps(grad_cam(model, x, classes, -1), MODELS[name]), scaled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["micro_vit", "micro_swin", "resnet18"])
def test_by_hand_from_the_definition(name):
    "One image at a time, the gradient through a plain forward pass with all weights learnable."
    model, x = classifier(name), random_images(MODELS[name])
    seen = []
    handle = model.encoder.blocks[-1].register_forward_hook(lambda m, i, o: seen.append(o))
    for i, c in enumerate((1, 1, 2)):
        seen.clear()
        grad, = torch.autograd.grad(model(x[i:i + 1])[0, c], seen)
        a, g = seen[0][0].detach(), grad[0]
        if name == "micro_vit": a, g = (v[1:].view(*model.encoder.grid, -1) for v in (a, g))
        if name == "resnet18": a, g = (v.permute(1, 2, 0) for v in (a, g))
        want = sum(g[..., k].mean() * a[..., k] for k in range(a.shape[-1]))
        got = grad_cam(model, x, torch.tensor([1, 1, 2]), -1, relu=False)[i]
        torch.testing.assert_close(got, want, atol=1e-5 * want.abs().max().item(), rtol=1e-4)
    handle.remove()


@pytest.mark.parametrize("name", ["micro_vit", "micro_swin"])
def test_at_the_last_norm_maps_add_up_to_the_logit(name):
    model, x = classifier(name), random_images(MODELS[name], channels=1)
    with torch.no_grad(): logits = model(x)
    for c in range(3): torch.testing.assert_close(grad_cam(model, x, c, relu=False).sum((1, 2)), logits[:, c], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("learn", [True, False])
def test_leaves_the_model_as_it_was(learn):
    model, x = classifier("micro_swin"), random_images(112)
    want = grad_cam(model, x)
    model.train().requires_grad_(learn)
    model.encoder.blocks[1].eval()
    if learn: model(x).sum().backward()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    grads = [p.grad.clone() if learn else None for p in model.parameters()]
    with torch.no_grad(): torch.testing.assert_close(grad_cam(model, x), want, atol=1e-6, rtol=0)
    with pytest.raises(GradCamError): grad_cam(model, x, 7)  # also where it fails on the way
    assert modes == [m.training for m in model.modules()] and torch.is_grad_enabled()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None if g is None else torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))
    assert not any(m._forward_hooks for m in model.modules())


def blobs(n: int = 12, side: int = 48) -> tuple[torch.Tensor, list]:
    "Noise, in two images of three brighter in a box; every second has another box; the last has none."
    g = torch.Generator().manual_seed(1)
    maps, boxes = torch.rand(n, side, side, generator=g), []
    for i in range(n):
        x, y, w, h = torch.randint(2, 20, (4,), generator=g).tolist()
        maps[i, y:y + h, x:x + w] += .4 * (i % 3 > 0)
        boxes.append(torch.tensor([[x, y, x + w, y + h], [40, 40, 46, 44]][:1 + i % 2], dtype=torch.float32))
    return maps, [*boxes[:-1], torch.zeros(0, 4)]


def union(boxes: torch.Tensor, side: int = 48) -> np.ndarray:
    out = np.zeros((side, side), bool)
    for x0, y0, x1, y1 in boxes.int().tolist(): out[y0:y1, x0:x1] = True
    return out


def test_numbers_of_an_image_by_other_means():
    maps, boxes = blobs()
    got = image_box_scores(maps, boxes, share=.6)
    for i, (m, b) in enumerate(zip(maps.numpy()[:-1], boxes)):
        truth = union(b)
        assert got.ap[i] == pytest.approx(average_precision_score(truth.ravel(), m.ravel()), abs=1e-4)  # scaling merges neighbours
        over = m >= m.min() + .6 * (m.max() - m.min())
        assert got.iou[i] == pytest.approx((over & truth).sum() / (over | truth).sum(), abs=2e-3)
        assert got.pointing[i] == truth.ravel()[m.argmax()]
    assert got.iloc[-1].isna().all() and 0 < got.pointing.mean() < 1
    again = image_box_scores(3 * maps - 7, boxes, share=.6)  # of any scale
    np.testing.assert_allclose(again, got, atol=2e-3)


def test_tolerance_is_euclidean_and_grows_hits():
    m = torch.zeros(1, 48, 48)
    m[0, 33, 24] = 1  # centre (24.5, 33.5): 4.5 to the right and 3.5 below the corner (20, 30)
    far = np.hypot(4.5, 3.5)
    hits = [image_box_scores(m, [[[10, 10, 20, 30]]], tolerance=t).pointing[0] for t in (0, far - .01, far + .01)]
    assert hits == [0, 0, 1]


def test_intervals_are_of_patients_and_the_oracle_chooses_in_each_draw():
    maps, boxes = blobs()
    who = ["a", "a", "b", "c", "d", "d", "e", "f", "g", "h", "i", "i"]
    table, each = box_scores({"m": maps, "less": maps.roll(9, 1)}, boxes, who, minus="less", n=200), image_box_scores(maps, boxes)
    first = table[table.method == "m"].set_index("number")
    for number in ("pointing", "iou", "ap"):
        ci = bootstrap_ci(np.mean, np.array(who[:-1]), each[number].to_numpy()[:-1], n=200)
        np.testing.assert_allclose(first.loc[number, ["value", "low", "high"]].astype(float), [ci.value, ci.low, ci.high])
    best = max(np.arange(1, 20) / 20, key=lambda s: image_box_scores(maps, boxes, share=s).iou.mean())
    assert first.loc["iou_oracle", "share"] == best and first.loc["iou", "share"] == .5
    assert first.loc["iou_oracle", "value"] == pytest.approx(image_box_scores(maps, boxes, share=best).iou.mean())
    assert (first["images"] == 11).all() and (first["patients"] == 9).all() and (first["left_out"] == 1).all()
    other = table[table.method == "less"].set_index("number")
    np.testing.assert_allclose(first.difference, first.value - other.value)
    assert other.difference.isna().all() and first.loc["ap", "difference_low"] > 0


@pytest.mark.parametrize("boxes, why", [
    ([[5, 5, 5, 9]], "holds no pixel"), ([[9, 5, 5, 9]], "holds no pixel"), ([[5.6, 5, 6.4, 9]], "holds no pixel"), ([[5, 5, 49, 9]], "within its 48 px"),
    ([[-1, 5, 9, 9]], "within its 48 px"), ([[5, 5, float("nan"), 9]], "expected"), ([5, 5, 9, 9], "expected"), ([[5, 5, 9]], "expected")])
def test_bad_boxes_name_their_image(boxes, why):
    with pytest.raises(GradCamError, match=f"image 1.*{why}"): image_box_scores(torch.rand(2, 48, 48), [torch.tensor([[1., 1, 9, 9]]), boxes])


def test_bad_maps_and_patients():
    maps, boxes = blobs()
    for bad in (maps[:3], maps[:, :9], maps * torch.nan):
        with pytest.raises(GradCamError, match="expected finite"): box_scores(bad, boxes, [*range(12)])
    with pytest.raises(GradCamError, match="0 with boxes"): box_scores(maps, [np.zeros((0, 4))] * 12, [*range(12)])
    with pytest.raises(GradCamError, match="11 patients of 12 images"): box_scores(maps, boxes, [*range(11)])
    with pytest.raises(GradCamError, match="a row for each map"): position_maps(maps, [*range(11)])


def test_controls_see_no_network_and_position_sees_no_image_of_the_patient():
    x = random_images(64, 5, 1)
    c = box_controls(x, (8, 8), random_images(64, 9, 1))
    assert {k: v.shape for k, v in c.items()} == dict.fromkeys(("centre", "random", "brightness", "edges", "brighter"), (5, 64, 64))
    assert torch.equal(c["random"], box_controls(1 - x, (8, 8))["random"]) and divmod(c["centre"][0].argmax().item(), 64) == (31, 31)
    maps = torch.rand(4, 8, 8)
    changed = maps.clone(); changed[0] = torch.rand(8, 8)
    a, b = (position_maps(m, ["p", "p", "q", "r"]) for m in (maps, changed))
    assert torch.equal(a[:2], b[:2]) and not torch.equal(a[2:], b[2:])


@pytest.mark.parametrize("name", ["micro_vit", "micro_swin", "resnet18"])
def test_weights_are_randomised_from_the_head_down(name):
    model, x, states = classifier(name), random_images(MODELS[name], 2), []

    def spy(net, images, target):
        states.append({k: v.clone() for k, v in net.encoder.model.named_parameters()})
        return grad_cam(net, images, target, relu=False)

    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    maps = randomised_maps(model, x, 1, spy, seeds=1)
    stages = list(maps)
    assert stages[:2] == ["trained", "head"] and stages[-1] == "rest" and len(stages) == len(states)
    assert torch.equal(torch.get_rng_state(), rng) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    part_of = {}
    names = {k: n for n, k in model.encoder.model.named_modules()}
    for part, modules in _parts(model.encoder).items():
        for module in modules: part_of |= {f"{names[module]}.{p}".lstrip("."): part for p, _ in module.named_parameters(recurse=False)}
    assert part_of.keys() == states[0].keys()
    for old, new, stage in zip(states, states[1:], stages[1:]):
        changed = {k for k in old if not torch.equal(old[k], new[k])}
        assert changed and {part_of[k] for k in changed} == {stage}
        matrices = {k for k, p in part_of.items() if p == stage and old[k].ndim > 1}
        assert matrices <= changed  # the others may begin as they were: norms at one, biases at zero


def test_the_check_can_fail_and_can_be_undefined():
    model, x = classifier("micro_vit", 1), random_images(64, 6, 1)
    depends = randomisation_check(randomised_maps(model, x), range(6), n=100)
    ignores = randomisation_check(randomised_maps(model, x, explain=lambda net, images, target: images[:, 0, ::8, ::8]), range(6), n=100)
    assert depends.abs_rho.iloc[-1] < .8 < ignores.abs_rho.iloc[-1] and not ignores.destroyed.any()
    upside = torch.rand(6, 4, 4)
    turned = randomisation_check({"trained": upside, "head": -upside}, range(6), n=100)  # the same map, its sign lost
    assert turned.rho[1] == pytest.approx(-1) and turned.abs_rho[1] == pytest.approx(1) and not turned.destroyed[1]
    flat = upside.clone(); flat[:2] = 0
    assert randomisation_check({"trained": upside, "head": flat}, range(6), n=100)["undefined"].tolist() == [0, 2]
    with pytest.raises(GradCamError, match="head: no image"): randomisation_check({"trained": upside, "head": 0 * upside}, range(6))
