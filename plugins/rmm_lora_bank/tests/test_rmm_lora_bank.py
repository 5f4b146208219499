"""The LoRA bank: its algebra against dense SVD, its tasks against diffusers' own `load_lora_weights`, its file, and what it refuses."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Unsupported, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft_rmm_lora_bank import Bank, build_bank, method
from diffgraft_rmm_lora_bank.build import layers_of, read_loras
from diffgraft_rmm_lora_bank.method import Update
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("peft")
SD = "StableDiffusionPipeline"
KINDS = {
    "one": {"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "to_k"]},
    "two": {"r": 3, "lora_alpha": 3, "target_modules": ["to_q", "conv1"]},
    "three": {"r": 4, "lora_alpha": 2, "target_modules": ["to_v", "conv1", "conv2"], "use_rslora": True},
}
"""Three LoRA of different ranks, strengths and layers, convolutions among them."""


def tiny(name: str = SD, seed: int = 0) -> Any:
    """A tiny pipeline and its call arguments; latents come out."""
    family = next(f for f in registry.families().values() if name in f.pipelines)
    module, function = family.tiny.split(":")
    made = getattr(importlib.import_module(module), function)(name, seed)
    made.kwargs["output_type"] = "latent"
    made.pipe.set_progress_bar_config(disable=True)
    return made


def write_lora(folder: Path, name: str, seed: int, pipeline: str = SD, scale: float = 0.2, **config: Any) -> Path:
    """A LoRA file with random weights, as diffusers writes it, its settings in the header."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = tiny(pipeline).pipe
    model = getattr(pipe, "unet", None) or pipe.transformer
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(init_lora_weights=False, **config))
    attribute = "unet" if hasattr(pipe, "unet") else "transformer"
    state = {key: scale * value.detach() for key, value in get_peft_model_state_dict(model).items()}
    about = {f"{attribute}_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    pipe.save_lora_weights(folder, **{f"{attribute}_lora_layers": state}, **about, weight_name=f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {name: write_lora(folder, name, seed, **config) for seed, (name, config) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def full(files: dict[str, Path]) -> Bank:
    """All three, nothing left out."""
    return build_bank(tiny().pipe, files, 3, "full", larger=True)


def run(made: Any, **extra: Any) -> Tensor:
    return made.pipe(**made.kwargs, **extra, generator=torch.Generator().manual_seed(0))[0].clone()


def effect(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def random_updates(ranks: tuple[int, ...], out: int = 20, into: int = 30) -> list[Update]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [Update(draw(out, r), draw(r, into)) for r in ranks]


def dense(x: Update) -> Tensor:
    return x.B @ x.A


# the algebra ------------------------------------------------------------------------------------------------------------------------


def test_the_gram_matrix_is_that_of_the_dense_updates() -> None:
    xs = random_updates((2, 5, 0, 3))
    flat = torch.stack([dense(x).flatten() for x in xs])
    assert torch.allclose(method.gram(xs), flat @ flat.T, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_the_basis_is_the_truncated_svd_of_the_stacked_updates(p: int) -> None:
    """Eckart and Young on the N x (out in) matrix, which the plugin never makes."""
    xs = random_updates((2, 5, 3, 4))
    flat = torch.stack([dense(x).flatten() for x in xs])
    U, s, Vh = torch.linalg.svd(flat, full_matrices=False)
    best = (U[:, :p] * s[:p]) @ Vh[:p]
    basis = method.basis_of(xs, p, None)
    c = method.coefficients(xs, basis)
    ours = torch.stack([sum(c[i, k] * dense(D) for k, D in enumerate(basis)).flatten() for i in range(4)])
    assert torch.allclose(ours, best, atol=1e-10)
    left = sum(method.residual(x, basis, c[i]) ** 2 for i, x in enumerate(xs))
    assert left == pytest.approx(float((s[p:] ** 2).sum()), abs=1e-18, rel=1e-9)
    V, values = method.eigenvectors(method.gram(xs), p)
    assert torch.allclose(values.sqrt(), s, rtol=1e-8)
    assert torch.allclose(V.abs(), U[:, :p].abs(), atol=1e-8)
    assert torch.allclose(c, V, atol=1e-8)  # for uncut ranks the fitted coefficients are the eigenvectors


def test_recompression_is_the_dense_svd() -> None:
    xs = random_updates((4, 4))
    whole = method.combination(xs, torch.tensor([0.5, -2.0], dtype=torch.float64))
    assert whole.rank == 8
    assert torch.allclose(dense(whole), 0.5 * dense(xs[0]) - 2 * dense(xs[1]))
    U, s, Vh = torch.linalg.svd(dense(whole))
    assert torch.allclose(dense(method.recompressed(whole, 3)), (U[:, :3] * s[:3]) @ Vh[:3], atol=1e-10)
    assert method.norm(whole) == pytest.approx(float(s.square().sum().sqrt()))


def test_cut_ranks_have_coefficients_fitted_to_them() -> None:
    """No other coefficients are better: the gradient of (1) is nought, and the eigenvectors themselves leave more."""
    xs = random_updates((4, 4, 4))
    basis = method.basis_of(xs, 2, 3)
    c = method.coefficients(xs, basis)
    V, _ = method.eigenvectors(method.gram(xs), 2)
    D = torch.stack([dense(each).flatten() for each in basis])
    flat = torch.stack([dense(x).flatten() for x in xs])
    assert ((flat - c @ D) @ D.T).abs().max() < 1e-9
    assert all(each.rank == 3 for each in basis)
    assert (flat - c @ D).norm() < (flat - V @ D).norm()


def test_equal_updates_need_one_basis_update() -> None:
    x = random_updates((3,))[0]
    xs = [x, Update(2 * x.B, x.A), Update(x.B, -x.A)]
    basis = method.basis_of(xs, 2, None)
    assert [each.rank for each in basis] == [3, 0]
    c = method.coefficients(xs, basis[:1])
    assert max(method.residual(each, basis[:1], c[i]) / method.norm(each) for i, each in enumerate(xs)) < 1e-12


def test_the_control_is_the_best_cut_of_each_alone() -> None:
    xs = random_updates((3, 4))
    cut = method.alone(xs, 4)
    values = torch.cat([torch.linalg.svdvals(dense(x)) for x in xs]).sort(descending=True).values
    left = sum((dense(x) - dense(y)).square().sum() for x, y in zip(xs, cut, strict=True))
    assert sum(each.rank for each in cut) == 4
    assert torch.allclose(left, values[4:].square().sum())


def test_rows_is_the_best_basis_at_each_position() -> None:
    xs = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(method.rows(xs, 4), xs)
    s = torch.linalg.svdvals(xs)
    assert torch.allclose((method.rows(xs, 2) - xs).square().sum((1, 2)), s[:, 2:].square().sum(1))


# a bank against diffusers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [SD, "FluxPipeline"])
def test_a_task_of_the_whole_bank_is_its_lora_loaded_by_diffusers(
    pipeline: str, tmp_path: Path, files: dict[str, Path], full: Bank
) -> None:
    made = tiny(pipeline)
    if pipeline != SD:
        kinds = {"one": {"r": 2, "lora_alpha": 8, "target_modules": ["to_q"]}, "two": {"r": 3, "target_modules": ["to_k", "to_q"]}}
        files = {name: write_lora(tmp_path, name, seed, pipeline, **config) for seed, (name, config) in enumerate(kinds.items())}
        full = build_bank(made.pipe, files, 2, "full", larger=True)
    base, wanted = run(made), {}
    for name, file in files.items():
        made.pipe.load_lora_weights(file)
        wanted[name] = run(made)
        made.pipe.unload_lora_weights()
        assert effect(wanted[name], base) > 1e-3
    full.save(tmp_path / "bank.safetensors")
    load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": str(tmp_path / "bank.safetensors"), "task": 0}})
    (tmp_path / "bank.safetensors").unlink()  # another task reads nothing
    for name in files:
        made.pipe.plugins.configure("rmm_lora_bank", task=name)
        assert effect(run(made), wanted[name]) < 1e-5 + 5e-4 * effect(wanted[name], base)
    report = made.pipe.plugins.report()
    assert report.forwards == report.denoiser_calls  # no forward more than the plain pipeline's
    assert set(report.forwards.values()) == {report.steps}
    assert "tasks in" in str(report)
    unload(made.pipe)
    assert torch.equal(run(made), base)
    assert not hasattr(made.pipe.unet if pipeline == SD else made.pipe.transformer, "peft_config")


@pytest.mark.parametrize("p", [1, 2])
def test_a_cut_bank_runs_as_the_dense_truncated_svd_written_into_the_weights(p: int, files: dict[str, Path]) -> None:
    """The whole of a run beside plain torch: (1) by a dense SVD a layer, the kept part of one task added to the weights themselves."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    made = tiny()
    bank = build_bank(made.pipe, files, p, "full", larger=True)
    wanted = deltas(made.pipe, files)
    untouched = {name: value.clone() for name, value in made.pipe.unet.state_dict().items()}
    kept: list[dict[str, Tensor]] = [{}, {}, {}]
    for path in set().union(*wanted.values()):
        shape = untouched[f"{path}.weight"].shape
        nought = torch.zeros(shape, dtype=torch.float64)
        rows = torch.stack([wanted[name].get(path, nought).flatten() for name in files])
        U, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        for one, row in zip(kept, (U[:, :p] * S[:p]) @ Vh[:p], strict=True):
            one[f"{path}.weight"] = row.reshape(shape)
    for scheduler in (DDIMScheduler, DPMSolverMultistepScheduler):
        made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config)
        plain, by_weights = run(made), []
        for one in kept:
            made.pipe.unet.load_state_dict({n: (v.double() + one[n]).float() if n in one else v for n, v in untouched.items()})
            by_weights.append(run(made))
        made.pipe.unet.load_state_dict(untouched)
        load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": bank, "task": 0}})
        for task, reference in enumerate(by_weights):
            made.pipe.plugins.configure("rmm_lora_bank", task=task)
            assert effect(reference, plain) > 1e-3 * float(plain.abs().max())
            assert effect(run(made), reference) < 1e-5 * float(plain.abs().max())
        unload(made.pipe)
        assert torch.equal(run(made), plain)


def test_a_mix_is_the_sum_of_the_updates(files: dict[str, Path], full: Bank) -> None:
    made = tiny()
    for name, file in files.items():
        made.pipe.load_lora_weights(file, adapter_name=name)
    made.pipe.set_adapters(["one", "three"], [0.5, -1.0])
    wanted = run(made)
    made.pipe.unload_lora_weights()
    load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": full, "task": {"one": 0.5, "three": -1}}})
    assert (run(made) - wanted).abs().max() < 2e-4 * wanted.abs().max()


def test_the_users_lora_stays_beside_the_task(files: dict[str, Path], full: Bank) -> None:
    made = tiny()
    made.pipe.load_lora_weights(files["one"], adapter_name="one")
    made.pipe.load_lora_weights(files["two"], adapter_name="two")
    made.pipe.set_adapters(["one", "two"])
    both = run(made)
    made.pipe.delete_adapters("two")
    load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": full, "task": "two"}})
    assert (run(made) - both).abs().max() < 2e-4 * both.abs().max()
    unload(made.pipe)
    assert made.pipe.get_active_adapters() == ["one"]


def test_a_strength_in_the_call_weakens_the_task_as_it_does_a_lora(files: dict[str, Path], full: Bank) -> None:
    made = tiny()
    scale = {"cross_attention_kwargs": {"scale": 0.25}}
    made.pipe.load_lora_weights(files["one"])
    wanted = run(made, **scale)
    made.pipe.unload_lora_weights()
    load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": full, "task": "one"}})
    assert (run(made, **scale) - wanted).abs().max() < 2e-4 * wanted.abs().max()


def test_a_plain_lora_is_a_bank_of_one_task(files: dict[str, Path]) -> None:
    made = tiny()
    made.pipe.load_lora_weights(files["two"])
    wanted = run(made)
    made.pipe.unload_lora_weights()
    load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": files["two"]}})
    assert torch.allclose(run(made), wanted, atol=1e-6)
    assert "a plain LoRA" in str(made.pipe.plugins.report())


def test_a_batch_is_its_samples(full: Bank) -> None:
    made = tiny()
    load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": full, "task": "three"}})
    call = {**made.kwargs, "prompt": ["a cat", "a dog"], "negative_prompt": None}
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    both = made.pipe(**call, generator=seeds)[0]
    alone = made.pipe(**{**call, "prompt": "a dog"}, generator=torch.Generator().manual_seed(1))[0]
    assert torch.allclose(both[1:], alone, atol=1e-4)


def test_half_precision(full: Bank) -> None:
    made = tiny()
    base = run(made)
    made.pipe.to(torch.bfloat16)
    load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": full, "task": "one"}})
    out = run(made)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    assert (out.float() - base).abs().max() > 1e-2


# what it costs and loses --------------------------------------------------------------------------------------------------------------


def deltas(pipe: Any, files: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    """dW of each task and layer, taken from peft itself by fusing."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, file in files.items():
        pipe.load_lora_weights(file)
        layers = [(path, layer) for path, layer in pipe.unet.named_modules() if hasattr(layer, "get_delta_weight")]
        found[name] = {path: layer.get_delta_weight(layer.active_adapters[0]).double() for path, layer in layers}
        pipe.unload_lora_weights()
    return found


@pytest.mark.parametrize(("p", "rank"), [(1, None), (2, 2), (2, "full"), (3, "full")])
def test_the_error_that_is_told_is_the_error_that_there_is(p: int, rank: Any, files: dict[str, Path], tmp_path: Path) -> None:
    pipe = tiny().pipe
    bank = build_bank(pipe, files, p, rank, larger=True)
    wanted = deltas(pipe, files)
    about, lora = bank.table.about, bank.loras["unet"].tensors
    for task, name in enumerate(files):
        left = whole = 0.0
        for path, _c in bank.table.coefficients.items():
            A, B = (lora[f"unet.{path}.lora_{half}.weight"].double().flatten(1) for half in "AB")
            strength = bank.table.strengths(torch.eye(3, dtype=torch.float64)[task])[path].double()
            truth = wanted[name].get(path)
            made = ((B * strength) @ A).reshape(pipe.unet.get_submodule(path).weight.shape)
            left += float((made - (0 if truth is None else truth)).square().sum())
            whole += 0.0 if truth is None else float(truth.square().sum())
        assert (left / whole) ** 0.5 == pytest.approx(about.errors[task], rel=1e-4, abs=2e-7)
    if (p, rank) == (3, "full"):
        assert max(about.errors) < 1e-5


def test_sizes_are_those_of_the_file_with_the_ranks_that_have_grown(files: dict[str, Path], tmp_path: Path) -> None:
    pipe = tiny().pipe
    with pytest.raises(ConfigError, match=r"would have .* bytes, and the 3 LoRA have"):
        build_bank(pipe, files, 3, "full")
    for p, rank in ((1, None), (2, 2), (3, "full")):
        bank = build_bank(pipe, files, p, rank, larger=True)
        bank.save(tmp_path / "bank.safetensors")
        stored = load_file(tmp_path / "bank.safetensors")
        assert bank.table.bytes == sum(value.numel() * value.element_size() for value in stored.values())
        assert bank.table.about.lora_bytes == sum(v.numel() * v.element_size() for f in files.values() for v in load_file(f).values())
        assert sum(c.numel() for c in bank.table.coefficients.values()) == 3 * p * len(bank.table.coefficients)
        ranks = bank.table.about.ranks
        assert all(len(each) == p and max(each) <= {None: 4, 2: 2, "full": 9}[rank] for each in ranks.values())
    assert max(map(sum, ranks.values())) > 9  # p r' of the whole bank is more than N r


def test_no_dense_reconstruction_is_stored_or_made(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of a bank is a thin factor or coefficients, and building multiplies none out."""
    pipe = tiny().pipe
    attribute, read = read_loras(pipe, files)
    layers = layers_of(pipe.unet, attribute, read)
    largest = []
    matmul = Tensor.__matmul__
    monkeypatch.setattr(Tensor, "__matmul__", lambda x, y: (largest.append(matmul(x, y).shape), matmul(x, y))[1])
    bank = build_bank(pipe, files, 2, "full", larger=True)
    total = 9  # ranks of all three
    assert largest
    assert all(min(shape) <= 2 * total for shape in largest)
    for path, updates in layers.items():
        out, into = updates[0].B.shape[0], updates[0].A.shape[1]
        parts = [bank.loras["unet"].tensors.get(f"unet.{path}.lora_{half}.weight") for half in "AB"]
        assert all(part is None or part.numel() < out * into or min(out, into) < 2 * total for part in parts)


def test_equal_loras_are_one_basis_update(files: dict[str, Path]) -> None:
    bank = build_bank(tiny().pipe, {"a": files["two"], "b": files["two"], "c": files["two"]}, 1)
    assert max(bank.table.about.errors) < 1e-6
    assert all(ranks == [3] for ranks in bank.table.about.ranks.values())
    assert bank.table.bytes < 0.4 * bank.table.about.lora_bytes


def test_alphas_of_sd_scripts_count(files: dict[str, Path]) -> None:
    """LoRA in memory with network alphas (kohya's names), as diffusers reads them."""
    made = tiny()
    path = next(name for name, part in made.pipe.unet.named_modules() if name.endswith("attn1.to_q"))
    layer, path = made.pipe.unet.get_submodule(path), path.replace(".", "_")
    width = layer.weight.shape[0]
    torch.manual_seed(0)
    down, up = torch.randn(4, width), torch.randn(width, 4)
    kohya = {
        f"lora_unet_{path}.lora_down.weight": down,
        f"lora_unet_{path}.lora_up.weight": up,
        f"lora_unet_{path}.alpha": torch.tensor(1.0),
    }
    bank = build_bank(made.pipe, {"kohya": kohya, "one": files["one"]}, 2, "full", larger=True)
    attribute, read = read_loras(made.pipe, {"kohya": kohya})
    update = next(iter(layers_of(made.pipe.unet, attribute, read).values()))[0]
    assert torch.allclose(dense(update), (up @ down).double() / 4)
    assert max(bank.table.about.errors) < 1e-5


# what is refused ------------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_built(files: dict[str, Path], tmp_path: Path) -> None:
    pipe = tiny().pipe
    two = {name: files[name] for name in ("one", "two")}
    with pytest.raises(ConfigError, match="a bank takes two or more"):
        build_bank(pipe, {"one": files["one"]}, 1)
    for p in (0, 3, True, 1.5):
        with pytest.raises(ConfigError, match=r"p = .*: 1 to 2"):
            build_bank(pipe, two, p)
    for rank in (0, "all", True):
        with pytest.raises(ConfigError, match="rank = "):
            build_bank(pipe, two, 1, rank)
    with pytest.raises(ConfigError, match="float16"):
        build_bank(pipe, two, 1, dtype="float15")
    with pytest.raises(ConfigError, match="no denoiser 'transformer'"):
        build_bank(pipe, two, 1, denoiser="transformer")
    with pytest.raises(ConfigError, match="gone"):
        build_bank(pipe, {**two, "gone": tmp_path / "gone.safetensors"}, 1)
    other = write_lora(tmp_path, "flux", 0, "FluxPipeline", r=2, target_modules=["to_q"])
    with pytest.raises(ArtefactMismatch, match=r"flux.* is no LoRA of this UNet2DConditionModel"):
        build_bank(pipe, {**two, "flux": other}, 1)
    lone = {name: value for name, value in load_file(files["one"]).items() if "to_k.lora_B" not in name}
    with pytest.raises(ArtefactMismatch, match=r"lone = .*has no lora_B beside it"):
        build_bank(pipe, {**two, "lone": lone}, 1)
    nought = {name: torch.zeros_like(value) for name, value in load_file(files["one"]).items()}
    with pytest.raises(ConfigError, match="every one is nought"):
        build_bank(pipe, {"a": nought, "b": nought}, 1)
    pipe.load_lora_weights(files["one"])
    pipe.fuse_lora()
    with pytest.raises(Unsupported, match="fused"):
        build_bank(pipe, two, 1)
    with pytest.raises(Unsupported, match="loads no LoRA"):
        build_bank(tiny("DDPMPipeline").pipe, two, 1)


def test_what_cannot_be_put_on(files: dict[str, Path], full: Bank, tmp_path: Path) -> None:
    made = tiny()
    before = set(made.pipe.unet.__dict__)

    def refused(error: type[Exception], match: str, pipe: Any = made.pipe, **knobs: Any) -> None:
        with pytest.raises(error, match=match):
            load_pipeline(pipe, plugins={"rmm_lora_bank": knobs})

    refused(ConfigError, "say which of the bank's 3 tasks: one, two, three", bank=full)
    refused(ConfigError, "no such task.*three", bank=full, task="thre")
    refused(ConfigError, "tasks 0 to 2", bank=full, task=3)
    refused(ConfigError, "no such task", bank=full, task={"one": 1.0, "four": 1.0})
    refused(ConfigError, "task", bank=full, task=True)
    refused(ConfigError, "gone", bank=tmp_path / "gone.safetensors")
    full.save(tmp_path / "bank.safetensors")
    refused(ArtefactMismatch, "of another model", pipe=tiny(seed=1).pipe, bank=tmp_path / "bank.safetensors", task=0)
    refused(ArtefactMismatch, "of another model", pipe=tiny(seed=1).pipe, bank=full, task=0)
    refused(ArtefactMismatch, "LoRA of this|for the unet", pipe=tiny("FluxPipeline").pipe, bank=tmp_path / "bank.safetensors", task=0)
    content = bytearray((tmp_path / "bank.safetensors").read_bytes())
    content[-3] ^= 255
    (tmp_path / "damaged.safetensors").write_bytes(content)
    refused(ArtefactMismatch, "damaged", bank=tmp_path / "damaged.safetensors", task=0)
    (tmp_path / "short.safetensors").write_bytes(content[:100])
    refused(ArtefactMismatch, "cannot be read", bank=tmp_path / "short.safetensors", task=0)
    assert set(made.pipe.unet.__dict__) == before
    assert not hasattr(made.pipe.unet, "peft_config")
    made.pipe.load_lora_weights(files["one"])
    made.pipe.fuse_lora()
    refused(Unsupported, "fused", bank=tmp_path / "bank.safetensors", task=0)


def test_numbers_names_and_halves_that_are_none(files: dict[str, Path], full: Bank, tmp_path: Path) -> None:
    made = tiny()
    one, two = load_file(files["one"]), load_file(files["two"])
    name = next(name for name in one if "lora_A" in name)
    for bad in (float("nan"), float("inf")):
        broken = {**one, name: one[name] * bad}
        with pytest.raises(ArtefactMismatch, match=rf"broken.*{re.escape(name)} has numbers that are not finite"):
            build_bank(made.pipe, {"broken": broken, "two": two}, 1)
        with pytest.raises(ArtefactMismatch, match="not finite"):
            load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": broken}})
    with pytest.raises(ArtefactMismatch, match="has shape"):
        build_bank(made.pipe, {"flat": {**one, name: one[name].flatten()}, "two": two}, 1)
    for loras in ([one, two], {1: one, "two": two}, {"": one, "two": two}):
        with pytest.raises(ConfigError, match=r"loras = .*a dict of names and LoRA"):
            build_bank(made.pipe, loras, 1)  # type: ignore[arg-type]
    for knobs in ({"task": {}}, {"task": {"one": 1e300}}, {"task": {"one": 10**400}}):
        with pytest.raises(ConfigError, match="task"):
            load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": full, **knobs}})
    for bank in ({}, {0: full}):
        with pytest.raises(ConfigError, match="bank"):
            load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": bank, "task": 0}})
    for path in (tmp_path, tmp_path / "bank", tmp_path / "bank.bin"):
        with pytest.raises(ConfigError, match=r"must end in \.safetensors"):
            full.save(path)


def test_a_bank_in_memory_by_denoiser_is_the_bank(files: dict[str, Path], full: Bank) -> None:
    made = tiny()
    load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": full, "task": "two"}})
    wanted = run(made)
    unload(made.pipe)
    load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": {"unet": full}, "task": "two"}})
    assert torch.equal(run(made), wanted)
    unload(made.pipe)
    with pytest.raises(ConfigError, match="no denoiser 'transformer'"):
        load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": {"transformer": full}, "task": 0}})


def test_a_bank_that_is_unloaded_or_met_by_a_fused_lora_says_so(files: dict[str, Path], full: Bank) -> None:
    made = tiny()
    load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": full, "task": "one"}})
    wanted = run(made)
    made.pipe.unload_lora_weights()  # takes the plugin's along
    with pytest.raises(ConfigError, match=r"no adapter 'diffgraft:rmm_lora_bank:bank'.*load the plugin again"):
        run(made)
    unload(made.pipe)
    load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": full, "task": "one"}})
    assert torch.equal(run(made), wanted)
    unload(made.pipe)
    made.pipe.load_lora_weights(files["one"])
    made.pipe.fuse_lora()
    with pytest.raises(Unsupported, match="unfuse_lora"):
        load_pipeline(made.pipe, plugins={"rmm_lora_bank": {"bank": full, "task": 0}})


def test_a_crafted_header_is_refused(full: Bank, tmp_path: Path) -> None:
    """A right checksum says who wrote a file, not that it makes sense."""
    from dataclasses import replace

    path = next(iter(full.table.coefficients))
    table = full.table

    def bent(**changes: Any) -> None:
        about = table.about.model_copy(update=changes.pop("about", {}))
        replace(full, tables={"unet": replace(table, about=about, **changes)}).save(tmp_path / "bent.safetensors")
        with pytest.raises(ArtefactMismatch):
            load_pipeline(tiny().pipe, plugins={"rmm_lora_bank": {"bank": tmp_path / "bent.safetensors", "task": 0}})

    bent(coefficients={**table.coefficients, path: table.coefficients[path][:, :2]})
    bent(coefficients={**table.coefficients, path: table.coefficients[path] * float("nan")})
    bent(coefficients={key: value for key, value in table.coefficients.items() if key != path})
    bent(about={"ranks": {**table.about.ranks, path: [1, 1, 1]}})
    bent(about={"ranks": {**table.about.ranks, path: [-1, 4, sum(table.about.ranks[path]) - 3]}})
    bent(about={"tasks": ["one", "two"]})
    bent(about={"denoiser": "transformer"})
    with safe_open(tmp_path / "bent.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"rmm_lora_bank"}


def test_the_command(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import typer
    from diffgraft_rmm_lora_bank import __main__ as command

    monkeypatch.setattr(command, "load_pipeline", lambda name: tiny().pipe)
    loras = [f"{name}={file}" for name, file in files.items()]
    command.main(loras, "any", p=2, rank="2", out=tmp_path / "bank.safetensors")
    said = capsys.readouterr().out
    assert "of the LoRA" in said
    assert "cut alone" in said
    assert (tmp_path / "bank.safetensors").is_file()
    command.main(loras, "any")
    assert "full" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        command.main(loras, "any", p=4)
    assert "1 to 3" in capsys.readouterr().err
    for extra, option in (({"out": tmp_path / "no.safetensors"}, "--out"), ({"rank": "2"}, "--rank"), ({"larger": True}, "--larger")):
        with pytest.raises(typer.Exit):  # nothing is left unread
            command.main(loras, "any", **extra)
        assert f"{option} without -p" in capsys.readouterr().err
    with pytest.raises(typer.Exit):
        command.main(loras, "any", p=2, out=tmp_path)
    assert "must end in .safetensors" in capsys.readouterr().err
    with pytest.raises(typer.BadParameter, match="two LoRA are called"):
        command.named(["a.safetensors", "b/a.safetensors"])
