"""The tasks vamba-pretrain, vamba-sft and bimba-sft: short runs that learn, go on, and answer in a chat."""

import contextlib
import io
import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("av")

from language_lists import talk, write_bimba_base, write_data, write_list, write_vamba  # noqa: E402
from rule import assert_rule  # noqa: E402

from fused import Bimba, Vamba  # noqa: E402
from fused.chat.__main__ import main as chat  # noqa: E402
from fused.models.vamba.stored import StoredTensors  # noqa: E402
from fused.train.__main__ import main  # noqa: E402
from fused.train.config import TrainConfig  # noqa: E402
from fused.train.config_file import read_config  # noqa: E402
from fused.train.language import students, trainer  # noqa: E402
from fused.train.language.samples import ConversationData, count_learnt  # noqa: E402
from fused.train.language.tasks import build_language_task, make_reader  # noqa: E402
from fused.train.seed import derive_seed, setup_seed  # noqa: E402
from fused.train.step import choose_recorder  # noqa: E402
from harness.instruments.two_processes import Training, log, run_trainings, steps, tensors  # noqa: E402

TASKS = ("vamba-pretrain", "vamba-sft", "bimba-sft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with models of random weights, videos and a list of conversations."""
    path = tmp_path_factory.mktemp("language")
    write_vamba(path / "vamba")
    write_bimba_base(path / "base")
    write_data(path / "data")
    return path


def words(folder: Path, task: str, out: Path | str, *more: str) -> list[str]:
    start, longest = ("base", []) if task == "bimba-sft" else ("vamba", ["language.longest=56"])
    return [
        f"task={task}", f"start={folder / start}", f"data.train={folder / 'data/list.json'}", f"out={out}", "batch_size=4",
        "language.frames=2", "data.workers=0", "log_every=1", "device=cpu", "optim.lr=2e-2", "deterministic=true", *longest,
        *more,
    ]  # fmt: skip


def run(folder: Path, task: str, out: Path | str, *more: str) -> str:
    """Train in this process, to whose generators and threads nothing happens; return what was printed."""
    output = io.StringIO()
    with torch.random.fork_rng(), contextlib.redirect_stdout(output):
        code = main(words(folder, task, out, "deterministic=false", *more))
    assert code == 0, output.getvalue()
    return output.getvalue()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("task", TASKS)
def test_a_run_learns_its_parts_and_its_folder_answers(folder: Path, tmp_path: Path, task: str, capsys: Any) -> None:
    more = ["language.lora_rank=4", "optim.floor=1.0"] if task == "bimba-sft" else []
    output = run(folder, task, tmp_path / "run", "steps=8", *more)
    losses = [line["loss"] for line in steps(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.05, losses
    assert "samples/s" in output and "4 conversations, 1 steps an epoch, 8 steps" in output
    lora = "adapters of rank 4 of q_proj and v_proj, mm_projector, compressor"
    due = {"vamba-pretrain": "cross_attn", "vamba-sft": "visual.merger", "bimba-sft": lora}[task]
    [line] = [line for line in output.splitlines() if line.startswith("learns ")]
    assert (due in line) and ("lm_head" not in line)
    question = ["--video", str(folder / "data/dark.avi"), "--frames", "2", "--question", "What is it?", "--max-new-tokens", "3"]
    assert chat(["--model", str(tmp_path / "run/model"), "--device", "cpu", *question]) == 0
    assert "the first token after" in capsys.readouterr().err
    stored = tensors(tmp_path / "run/checkpoints/step-00000008")
    learnt = {name.removeprefix("model.") for name in stored if name.startswith("model.")}
    changed = _changed(folder, tmp_path / "run/model", task)
    assert changed and changed <= {name.removeprefix("model.") for name in learnt}


def _changed(folder: Path, model: Path, task: str) -> set[str]:
    """Return the names of the parameters of a trained model that differ from those of its start."""
    if task != "bimba-sft":
        before, after = (Vamba.from_pretrained(path, vision=True).state_dict() for path in (folder / "vamba", model))
        return {name for name in before if not torch.equal(before[name], after[name])}
    before, after = Bimba.from_base(folder / "base").state_dict(), Bimba.from_pretrained(model).state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before if name.startswith("mm_projector."))
    assert "compressor.layers.0.mixer.out_proj.weight" in after
    adapted = {name for name in before if not torch.equal(before[name], after[name]) and name.startswith("language_model.")}
    assert {name.rpartition(".self_attn.")[2] for name in adapted} == {"q_proj.weight", "v_proj.weight"}
    return {name for name in before if not torch.equal(before[name], after[name]) and name.startswith("mm_projector.")}


def test_bimbas_folder_is_upstreams(folder: Path, tmp_path: Path) -> None:
    """Adapters with peft's names, and what was trained beside them with those of LLaVA."""
    from peft import LoraConfig
    from safetensors.torch import load_file

    more = "steps=1", "language.lora_rank=4", "language.lora_alpha=8", "language.lora_targets=[q_proj,o_proj]"
    run(folder, "bimba-sft", tmp_path / "run", *more)
    model = tmp_path / "run/model"
    lora = LoraConfig.from_pretrained(str(model))
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (4, 8, {"q_proj", "o_proj"})
    assert lora.base_model_name_or_path == str(folder / "base")
    names = set(load_file(model / "adapter_model.safetensors"))
    attention = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    assert names == {attention.format(i, p, half) for i in (0, 1) for p in "qo" for half in "AB"}
    beside = torch.load(model / "non_lora_trainables.bin")
    assert {n.split(".")[3] for n in beside} == {"mm_projector", "compressor"}
    assert all(n.startswith("base_model.model.model.") for n in beside)
    assert json.loads((model / "config.json").read_text())["compressor_type"] == "mamba"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch with one thread, whose sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("unchecked", "one_thread")
@pytest.mark.parametrize("task", TASKS)
def test_a_run_in_parts_is_one_run_bit_for_bit(folder: Path, tmp_path: Path, task: str) -> None:
    """Stopped within an epoch and at its end; rows of a few samples, dropout in adapters; a worker decodes in the last part."""
    more = ["language.length=500", "batch_size=2", "optim.floor=1.0"]  # a schedule that does not depend on the last step
    more += ["language.lora_dropout=0.3", "language.lora_rank=2"] if task == "bimba-sft" else []
    run(folder, task, tmp_path / "whole", *more, "steps=3")
    run(folder, task, tmp_path / "parts", *more, "steps=1")
    assert "goes on behind step 1" in run(folder, task, tmp_path / "parts", *more, "steps=2")
    assert "goes on behind step 2" in run(folder, task, tmp_path / "parts", *more, "steps=3", "data.workers=1")
    whole, parts = (tensors(tmp_path / name / "checkpoints/step-00000003") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = [[line["loss"] for line in steps(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def gradients(folder: Path, task: str, precision: torch.dtype, alone: bool, *more: str) -> dict[str, torch.Tensor]:
    """Return the gradients of a step over all conversations, in rows or of each sample alone, in one process."""
    config = read_config(None, words(folder, task, folder / "none", "steps=1", *more))
    setup_seed(config.seed, config.deterministic)
    built = build_language_task(config, torch.device("cpu")).train()
    built.student.to(precision)
    data = ConversationData(Path(str(config.data.train)), None, make_reader(config))
    samples = [data.sample(i, 0) for i in range(len(data))]
    learnt = sum(count_learnt([sample]) for sample in samples)
    weights = torch.tensor([1 / learnt, 1 / len(samples)], dtype=precision)
    rows = [[sample] for sample in samples] if alone else data.collate(samples, range(4), ()).rows
    for row in rows:
        built(*built.prepare_row(row, weights, torch.device("cpu")))[0].backward()
    named = built.student.named_parameters()
    return {name: p.grad for name, p in named if p.requires_grad and not name.endswith("cross_attn.k_proj.bias")}


def flat(tensors: dict[str, torch.Tensor], names: Collection[str]) -> dict[str, torch.Tensor]:
    return {"gradient": torch.cat([tensors[name].flatten() for name in sorted(names)])}


@pytest.mark.parametrize("distilled", [False, True])
def test_a_packed_step_is_the_sum_of_its_samples(folder: Path, distilled: bool) -> None:
    """By the rule, also with the distillation, whose teacher reads packed rows too. All that learns has a gradient."""
    task, more = "vamba-pretrain", ["language.length=1000", f"language.distillation={float(distilled)}"]
    packed = gradients(folder, task, torch.float32, False, *more)
    truth, plain = (gradients(folder, task, precision, True, *more) for precision in (torch.float64, torch.float32))
    assert len(packed) > 20 and all(x is not None and x.isfinite().all() for x in packed.values())
    assert_rule([tuple(flat(x, packed) for x in (packed, truth, plain))])


def test_two_processes_take_the_step_of_one(folder: Path, tmp_path: Path) -> None:
    """By DDP and FSDP2, by the rule: answers are of different lengths, and one process has more rows than the other."""
    own = {"bimba-sft": ["language.lora_dropout=0"], "vamba-pretrain": ["language.distillation=1.0"], "vamba-sft": []}
    more = {task: ["steps=1", "language.length=400", *own[task]] for task in TASKS}
    runs = {(task, kind): tmp_path / task / kind for task in TASKS for kind in ("ddp", "fsdp")}
    trainings = [
        Training((*words(folder, task, out, *more[task]), f"parallel={kind}"), True) for (task, kind), out in runs.items()
    ]
    stored_low = write_bimba_base(tmp_path / "low", torch.bfloat16)
    low = [f"start={stored_low}", "precision=bfloat16", *more["bimba-sft"]]
    trainings.append(Training((*words(folder, "bimba-sft", tmp_path / "low/run", *low), "parallel=fsdp"), True))
    output = run_trainings(trainings, tmp_path)
    assert output.count("2 processes") == output.count("done: ") == len(runs) + 1, output
    run(folder, "bimba-sft", tmp_path / "low/one", *low)
    one, two = (steps(tmp_path / "low" / name)[0]["loss"] for name in ("one", "run"))
    assert abs(one - two) <= torch.finfo(torch.bfloat16).eps / 2 * one
    assert {x.dtype for x in tensors(tmp_path / "low/run/checkpoints/step-00000001").values()} == {torch.float32}
    for task in TASKS:
        truth, plain = (gradients(folder, task, precision, True, *more[task]) for precision in (torch.float64, torch.float32))
        for kind in ("ddp", "fsdp"):
            stored = tensors(runs[task, kind] / "checkpoints/step-00000001")
            beginning = "optimizer.exp_avg."
            found = {key.removeprefix(beginning): 10 * x for key, x in stored.items() if key.startswith(beginning)}
            assert truth.keys() <= found.keys()
            assert_rule([tuple(flat(x, truth) for x in (found, truth, plain))])
            assert (runs[task, kind] / "model/config.json").is_file()


def test_bfloat16_computes_in_it_and_keeps_parameters_in_float32(folder: Path, tmp_path: Path) -> None:
    """What is written is bfloat16, but for A_log and D."""
    from safetensors.torch import load_file

    run(folder, "vamba-sft", tmp_path / "run", "steps=2", "precision=bfloat16")
    losses = [line["loss"] for line in steps(tmp_path / "run")]
    assert losses[1] < losses[0]
    stored = tensors(tmp_path / "run/checkpoints/step-00000002")
    assert {x.dtype for name, x in stored.items() if name.startswith("model.")} == {torch.float32}
    before, after = (Vamba.from_pretrained(path).stop_tokens for path in (folder / "vamba", tmp_path / "run/model"))
    assert before == after != ()
    state = load_file(tmp_path / "run/model/model.safetensors")
    assert {x.dtype for name, x in state.items() if name.rpartition(".")[2] in ("A_log", "D")} == {torch.float32}
    assert {x.dtype for name, x in state.items() if name.rpartition(".")[2] not in ("A_log", "D")} == {torch.bfloat16}


def as_stored_in_16_bits(folder: Path, path: Path) -> Path:
    """Write the Vamba of the folder as published weights are, in bfloat16, with its tokenizer; return the path."""
    Vamba.from_pretrained(folder / "vamba", vision=True, dtype=torch.bfloat16).save_pretrained(path)
    for file in (folder / "vamba").glob("*token*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


def loss_and_gradients(config: TrainConfig) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the task of a configuration, and the gradients, with the loss, of a step over its first conversation."""
    setup_seed(config.seed, config.deterministic)
    built = build_language_task(config, torch.device("cpu")).train()
    sample = ConversationData(Path(str(config.data.train)), None, make_reader(config)).sample(0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = built(*built.prepare_row([sample], torch.ones(2), torch.device("cpu")))
    loss.backward()
    return built, {name: p.grad for name, p in built.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


@pytest.mark.parametrize("task", ["vamba-pretrain", "vamba-sft"])
def test_what_does_not_learn_stays_as_stored_and_gives_the_same_bits(
    folder: Path, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits weights of products do. What learns is float32, as is the rest. Without autocast all are."""
    start = as_stored_in_16_bits(folder, tmp_path / "start")
    given = [*words(folder, task, tmp_path / "none", "steps=1"), f"start={start}"]
    config = read_config(None, [*given, "precision=bfloat16"])
    built, found = loss_and_gradients(config)
    kinds = {name.removeprefix("student.model."): (p.requires_grad, p.dtype) for name, p in built.named_parameters()}
    frozen = {"vamba-pretrain": "model.layers.0.mlp.up_proj.weight", "vamba-sft": "lm_head.weight"}[task]
    assert kinds[frozen] == (False, torch.bfloat16)
    assert kinds["model.layers.0.cross_attn.q_proj.weight"] == (True, torch.float32)
    assert kinds["model.embed_tokens.weight"][1] == torch.float32  # the stream begins there
    assert all(dtype == torch.float32 for learns, dtype in kinds.values() if learns)
    monkeypatch.setattr("fused.train.language.tasks.keep_frozen_as_stored", lambda beginning: None)
    whole, due = loss_and_gradients(config)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert found.keys() == due.keys() and all(torch.equal(found[name], due[name]) for name in due)
    monkeypatch.undo()
    plain = build_language_task(read_config(None, given), torch.device("cpu"))
    assert {p.dtype for p in plain.parameters()} == {torch.float32}


def _refuse_whole_tensors() -> None:
    """Let no process read more than its half of a tensor."""
    read = StoredTensors.read_rows

    def read_half(self: StoredTensors, name: str, start: int, stop: int) -> torch.Tensor:
        length = self.shapes[name][0]
        assert stop - start <= (length + 1) // 2, f"{name}: {stop - start} of {length} rows were read"
        return read(self, name, start, stop)

    StoredTensors.read_rows, StoredTensors.read = read_half, None  # type: ignore[method-assign,assignment]


def test_a_process_reads_its_shards_and_no_more(folder: Path, tmp_path: Path) -> None:
    """Also of weights in 16 bits, which are sharded beside float32, and rows that are not even. The model is that of one."""
    start = as_stored_in_16_bits(folder, tmp_path / "start")
    given = words(folder, "vamba-pretrain", tmp_path / "shards", "steps=1", f"start={start}", "precision=bfloat16")
    output = run_trainings([Training((*given, "parallel=fsdp"), True)], tmp_path, _refuse_whole_tensors)
    assert "GiB a process on cpu" in output and "done: 1 steps" in output
    run(folder, "vamba-pretrain", tmp_path / "one", "steps=1", f"start={start}", "precision=bfloat16")
    one, shards = (Vamba.from_pretrained(tmp_path / name / "model", vision=True).state_dict() for name in ("one", "shards"))
    before = Vamba.from_pretrained(start, vision=True).state_dict()
    same = {name for name in one if torch.equal(one[name], before[name])}
    assert same >= {name for name in one if "cross_attn" not in name and "vision_mixer" not in name and "alpha" not in name}
    assert all(torch.equal(shards[name], before[name]) for name in same)
    assert all(torch.allclose(shards[name], one[name], rtol=0, atol=0.05) for name in one)  # a step is 0.02


def test_too_large_a_model_is_refused_before_it_is_read(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fused.train.language.weights.free_bytes", lambda device: 1000)
    monkeypatch.setattr(StoredTensors, "read_rows", lambda *_: pytest.fail("weights were read"))
    assert main(words(folder, "vamba-sft", tmp_path / "run", "steps=1", "--dry-run")) == 2
    error = capsys.readouterr().err
    assert "start is a model that takes 0.00 GiB on this cpu, with gradients and moments, and 0.00 GiB are free" in error
    assert "parallel=fsdp" in error
def test_what_is_frozen_stays_as_it_is_stored_where_products_are_bfloat16(folder: Path, tmp_path: Path) -> None:
    """What learns is float32, gets gradients, and goes on bit for bit; in float32 all is."""
    start = write_bimba_base(tmp_path / "base", torch.bfloat16)
    more = [f"start={start}", "language.lora_rank=2", "optim.floor=1.0", "batch_size=2"]
    for precision, stored in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        config = read_config(None, words(folder, "bimba-sft", "none", "steps=1", f"precision={precision}", *more))
        task = build_language_task(config, torch.device("cpu"))
        learnt = {n: p for n, p in task.student.named_parameters() if p.requires_grad}
        frozen = {n: p for n, p in task.student.named_parameters() if n not in learnt}
        assert {p.dtype for p in learnt.values()} == {torch.float32} and {p.dtype for p in frozen.values()} == {stored}
        assert any("lora_A" in name for name in learnt) and "model.image_newline" in frozen
    more.append("precision=bfloat16")
    run(folder, "bimba-sft", tmp_path / "whole", *more, "steps=3")
    run(folder, "bimba-sft", tmp_path / "parts", *more, "steps=1")
    assert "goes on behind step 1" in run(folder, "bimba-sft", tmp_path / "parts", *more, "steps=3")
    whole, parts = (tensors(tmp_path / name / "checkpoints/step-00000003") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert all(whole[name].any() for name in whole if name.startswith("optimizer.exp_avg.") and "out_proj" in name)


def test_a_bimba_computes_logits_of_learnt_tokens_alone(folder: Path) -> None:
    """The loss is that of `Bimba.forward`, whose logits are of the whole row."""
    config = read_config(None, words(folder, "bimba-sft", "none", "steps=1", "language.lora_dropout=0"))
    task = build_language_task(config, torch.device("cpu"))
    data = ConversationData(Path(str(config.data.train)), None, make_reader(config))
    rows: list[int] = []
    student: Any = task.student
    student.model.language_model.lm_head.register_forward_hook(lambda module, given, out: rows.append(given[0].shape[0]))
    for index in range(len(data)):
        sample = data.sample(index, 0)
        learnt = count_learnt([sample])
        loss, _ = task(*task.prepare_row([sample], torch.ones(2), torch.device("cpu")))
        assert rows.pop() == learnt < len(sample.tokens) and not rows
        labels = sample.labels.clone()
        labels[0] = -100
        frames = sample.frames if len(sample.frames) else None
        due = student.model(sample.tokens, frames, labels=labels).loss
        rows.clear()
        torch.testing.assert_close(loss, due * learnt)


def test_parts_that_learn_are_chosen_by_name(folder: Path, tmp_path: Path, capsys: Any) -> None:
    given = words(folder, "vamba-sft", tmp_path / "run", "steps=1", "language.trainable=[layers.1.mlp,alpha]", "--dry-run")
    assert main(given) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("learns ")]
    assert line.endswith("model.layers.*.alpha, model.layers.*.mlp")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        ("vamba-sft", "language.trainable=[attn_x]", "language.trainable is ('attn_x',); no parameter that can learn has"),
        ("vamba-sft", "language.frames=3", "language.frames is 3; allowed: an even number"),
        ("vamba-sft", "language.mixer={d_state: 3}", "language.mixer is given; task 'vamba-sft' does not read it"),
        ("vamba-pretrain", "language.mixer={d_state: 3}", "is a Vamba; allowed: nothing, its weights say it"),
        ("vamba-pretrain", "language.mixer={states: 3}", "language.mixer is {'states': 3}; allowed: keywords of Mamba2"),
        ("vamba-pretrain", "teacher=x", "teacher is given; task 'vamba-pretrain' does not read it"),
        ("vamba-pretrain", "data.frames=3", "data.frames is given; task 'vamba-pretrain' does not read it"),
        ("vamba-sft", "language.lora_rank=3", "language.lora_rank is given; task 'vamba-sft' does not read it"),
        ("bimba-sft", "language.longest=3", "language.longest is given; task 'bimba-sft' does not read it"),
        ("bimba-sft", "language.lora_targets=[nothing]", "nothing"),
        ("bimba-sft", "start=vamba", "vamba holds no projector, whose keys begin with model.mm_projector."),
        ("vamba-sft", "start=base", "neither a Vamba nor a Qwen2-VL"),
        ("bimba-sft", "start=none/such", "none/such', and there is no such folder; allowed: that of a model; a repository"),
        ("vamba-sft", "start=null", "start is None; allowed: for task 'vamba-sft' the folder of a model"),
        ("vamba-sft", "data.train=none.json", "data.train: "),
        ("vamba-sft", "language.length=30", "data.train: none of 4 entries that were tried gives a sample"),
        ("vamba-sft", "batch_size=5", "batch_size is 5; allowed: up to the 4 conversations of"),
        (
            "vamba-pretrain", "language.distillation=1 language.trainable=[cross_attn,mlp]",
            "language.distillation is 1, and model.layers.*.mlp, visual.blocks.*.mlp, visual.merger.mlp.* learn; allowed: 0",
        ),
    ],
)  # fmt: skip
def test_wrong_options_are_said(folder: Path, tmp_path: Path, task: str, more: str, said: str, capsys: Any) -> None:
    if more.startswith("start=") and not more.endswith("null"):
        more = f"start={folder / more.removeprefix('start=')}"
    words_given = more.split() if more.startswith("language.distillation") else [more]
    with torch.random.fork_rng():
        assert main(words(folder, task, tmp_path / "run", "steps=1", *words_given, "--dry-run")) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temporal_pooling": 3}, "language.frames is 2; allowed: from 3 up, temporal_pooling of"),
        ({"mm_newline_position": "one_token"}, "mm_newline_position must be one of 'grid', 'frame', 'no_token', got"),
        ({"temporal_pooling": -1}, "temporal_pooling must be an integer from 1 up, got -1"),
    ],
    ids=str,
)
def test_a_base_model_that_does_not_fit_is_said(
    folder: Path, tmp_path: Path, settings: dict[str, Any], said: str, capsys: Any
) -> None:
    start = Path(shutil.copytree(folder / "base", tmp_path / "base"))
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | settings))
    assert main(words(folder, "bimba-sft", tmp_path / "run", "steps=1", f"start={start}", "--dry-run")) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_steps_are_eager_on_a_gpu_too(folder: Path, task: str) -> None:
    """A graph would hold the lengths of the row that it was recorded with."""
    config = read_config(None, words(folder, task, "none", "steps=1"))
    recorder, line = choose_recorder(config, torch.device("cuda"))
    assert recorder is None and "rows of conversations differ in length" in line


def test_a_bimba_takes_no_images(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (folder / "data/still.png").write_bytes(b"")
    path = write_list(folder / "data/images.json", [talk("Q", "A"), talk("<image>Q", "A", image="still.png")])
    assert main(words(folder, "bimba-sft", tmp_path / "run", "steps=1", f"data.train={path}", "batch_size=1", "--dry-run")) == 2
    assert "1 of 2 entries, the first is images.json#1, have an image" in capsys.readouterr().err


def test_what_gave_no_sample_is_counted(folder: Path, tmp_path: Path) -> None:
    given = [talk(f"Q{i}", "A") for i in range(4)] + [talk("Q", "A" * 900)]
    path = write_list(folder / "data/long.json", given)
    output = run(folder, "vamba-sft", tmp_path / "run", "epochs=2", f"data.train={path}", "language.length=300")
    assert "1 of 5 samples is too long" in output and "are more than language.length 300" in output
    assert [line["too_long"] for line in log(tmp_path / "run") if "file" in line] == [True]


def test_every_key_of_the_tasks_is_printed_and_read_again(folder: Path, tmp_path: Path, capsys: Any) -> None:
    for task in TASKS:
        given = words(folder, task, tmp_path / "run", "steps=1")
        assert main([*given, "--print-config"]) == 0
        text = capsys.readouterr().out
        (tmp_path / "printed.yaml").write_text(text)
        assert read_config(tmp_path / "printed.yaml") == read_config(None, given)
        assert ("lora_rank" in text) == (task == "bimba-sft") and ("longest" in text) == (task != "bimba-sft")
        assert "mixup" not in text and "accumulate" not in text and "stride" not in text


def task_of(folder: Path, task: str, *more: str) -> tuple[Any, list[Any]]:
    """Return a task in training mode, and the samples of its list."""
    config = read_config(None, words(folder, task, folder / "none", "steps=1", *more))
    built = build_language_task(config, torch.device("cpu")).train()
    data = ConversationData(Path(str(config.data.train)), None, make_reader(config))
    return built, [data.sample(i, 0) for i in range(len(data))]


def test_the_loss_is_made_of_its_parts_by_their_weights(folder: Path) -> None:
    """Weights are powers of two, by which all scales exactly."""

    def loss(tokens: float, samples: float, count: int = 3) -> tuple[float, float, float]:
        more = ["language.distillation=2.0", f"language.distillation_tokens={count}"]
        built, row = task_of(folder, "vamba-pretrain", *more)
        whole, parts = built(*built.prepare_row(row, torch.tensor([tokens, samples]), torch.device("cpu")))
        return whole.item(), parts["cross_entropy"].item(), parts["divergence"].item()

    whole, entropy, divergence = loss(0.5, 0.25)
    assert whole == pytest.approx(entropy + 2.0 * divergence, rel=1e-6) and divergence > 0
    assert loss(1.0, 0.25)[1:] == (2 * entropy, divergence)
    assert loss(0.5, 1.0)[1:] == (entropy, 4 * divergence)
    assert loss(0.5, 0.25, count=2)[2] != divergence


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_recomputing_is_asked_of_the_model(folder: Path, task: str, wanted: bool) -> None:
    built, _ = task_of(folder, task, f"language.recompute={str(wanted).lower()}")
    model = built.student.model
    assert (model.language_model.is_gradient_checkpointing if task == "bimba-sft" else model.recompute_layers) is wanted


def test_a_text_alone_gives_all_that_learns_a_gradient(folder: Path) -> None:
    """Of 0 where it is not read, so that processes reduce as many gradients."""
    built, samples = task_of(folder, "bimba-sft")
    [row] = [[sample] for sample in samples if not sample.video_tokens]
    built(*built.prepare_row(row, torch.ones(2), torch.device("cpu")))[0].backward()
    gradients = {name: p.grad for name, p in built.student.named_parameters() if p.requires_grad}
    assert all(x is not None for x in gradients.values())
    assert all(not x.any() for name, x in gradients.items() if "mm_projector" in name)


def test_frames_of_one_size_pass_together_and_others_apart() -> None:
    parts = [torch.full((2, 3, *size), i) for i, size in enumerate([(28, 28), (28, 28), (28, 56), (56, 56), (28, 28)])]
    found = students.joined(parts)
    assert [tuple(part.shape) for part in found] == [(4, 3, 28, 28), (2, 3, 28, 56), (2, 3, 56, 56), (2, 3, 28, 28)]
    assert [part.unique().tolist() for part in found] == [[0, 1], [2], [3], [4]]


def test_every_row_has_random_numbers_of_its_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(trainer, "derive_seed", lambda *given: seeds.append(derive_seed(*given)) or seeds[-1])
    run(folder, "vamba-sft", tmp_path / "run", "steps=2", "language.length=400")
    assert len(set(seeds)) == len(seeds) > 2
