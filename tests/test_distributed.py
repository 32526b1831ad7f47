"""Two processes with half of each batch are one with all of it.

Forked processes that are joined as torchrun would join them; under torchrun itself:
test_torchrun.py.
"""

import os
import signal
import socket

import pytest
import torch
import torch.distributed as dist

import lora
import proxies
import tiny
import train
from relatives import rank_scores, single_ranks
from support import checkpoint, distributed, flags, run_folder

# One after the other: two that look for a free port at once may find the same.
pytestmark = pytest.mark.xdist_group("processes")

METHODS = {
    "lora": "--preset lora --accumulate 2 --clip 0.5",
    "heterolora": "--every 0.4 --score-batches 2",
    "tied": "--adapter tied --every 0.4 --score-batches 2 --clip 0.5",
    "reslora": "--adapter reslora_middle --every 0.4 --score-batches 2",
    "delta": "--preset delta-lora --delta-ratio 0.5 --delta-start 1",
}


@pytest.fixture
def argv(tmp_path):
    """24 examples in batches of 5: shares of 3 and 2, and a last batch of 4."""
    model, task = tiny.bert_folder(tmp_path / "model"), tiny.task_folder(tmp_path / "task")
    text = f"--task mrpc --data-dir {task} --model {model} --r 2 --batch-size 5 --lr 0.01"
    return [*text.split(), "--device", "cpu"]


def two_epochs(argv):
    """A run in float64: what came of it."""
    run, losses = train.set_up(flags.parse_flags(argv)), []
    run.model.double()
    for epoch in range(2):
        groups = train.epoch_steps(run, epoch)
        for i, group in enumerate(groups):
            if run.plan and run.plan.due(run.step, i, len(groups)):
                train.decide(run)
            losses.append(train.train_step(run, group, 0.01))
            run.step += 1
    return {
        "losses": losses,
        "metrics": train.evaluate(run.model, run.task, run.dev),
        "parameters": {n: p.detach() for n, p in lora.trainable(run.model).items()},
        "weights": {n: p.detach() for n, p in run.model.named_parameters() if "base" in n},
        "history": run.plan.history if run.plan else [],
    }


def free_port():
    """Below those that the system hands out, and looked for where no other test process looks."""
    for port in range(20_000 + os.getpid() % 1000 * 10, 32_000):
        with socket.socket() as free:
            try:
                free.bind(("localhost", port))
            except OSError:
                continue
            return port
    raise OSError("no free port from 20,000 to 32,000")


def in_processes(function, count, folder):
    """[function() in process 0, 1, …], forked, joined as torchrun would join them."""
    port = free_port()
    children = []
    for rank in range(count):  # what they print is no part of the result
        children.append(os.fork())
        if children[-1] == 0:
            code = 70
            try:
                signal.alarm(300)  # rather an error than an endless wait for the other
                where = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
                where |= {"RANK": rank, "WORLD_SIZE": count}
                os.environ.update({k: str(v) for k, v in where.items()})
                distributed.start()
                dist.barrier()  # or one that exchanges nothing is gone before the other is there
                torch.save(function(), folder / f"result.{rank}")
                distributed.stop()
                code = 0
            finally:
                os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * count
    return [torch.load(folder / f"result.{rank}") for rank in range(count)]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(argv, tmp_path, method):
    """Losses, metrics, A, B, W and scores to 1e-10; the two between themselves to the bit."""
    argv += METHODS[method].split()
    one = two_epochs(argv)
    first, second = in_processes(lambda: two_epochs(argv), 2, tmp_path)
    for key in one:
        torch.testing.assert_close(first[key], one[key], rtol=0, atol=1e-10)
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    decisions = [[n for n, on in h["on"].items() if on] for h in one["history"]]
    assert decisions == [[n for n, on in h["on"].items() if on] for h in first["history"]]
    assert len(decisions) == (6 if "--every" in METHODS[method] else 0)
    assert len(set(one["losses"])) == len(one["losses"])


def test_processes_that_would_disagree_agree(argv, tmp_path, monkeypatch):
    """Scores that differ by rounding between machines: all decide by the mean."""

    def tilted(_name, model, _batches):
        tilt = 1e-9 * (-1) ** distributed.rank()
        return {n: 1.0 + tilt * (-1) ** i for i, n in enumerate(lora.adapters(model))}

    def decide():
        run = train.set_up(flags.parse_flags(argv))
        train.decide(run)
        return run.plan.history[0]

    monkeypatch.setattr(train.proxies, "score", tilted)
    first, second = in_processes(decide, 2, tmp_path)
    assert first == second and set(first["scores"].values()) == {1.0}


def test_processes_that_would_disagree_about_ranks_agree(argv, tmp_path, monkeypatch):
    def tilted(_name, model, _batches):
        tilt = 1e-9 * (-1) ** distributed.rank()
        layers = lora.adapters(model).items()
        return {
            n: [1.0 + tilt * (-1) ** (i + k) for k in range(a.r)] for i, (n, a) in enumerate(layers)
        }

    def decide():
        words = "--allocate dynamic --per-rank yes --budget-params 600"
        run = train.set_up(flags.parse_flags([*argv, *words.split()]))
        train.decide(run)
        return run.plan.history[0]

    monkeypatch.setattr(single_ranks, "score_ranks", tilted)
    first, second = in_processes(decide, 2, tmp_path)
    assert first == second and {s for parts in first["scores"].values() for s in parts} == {1.0}


def test_each_process_draws_its_own_dropout(argv, tmp_path):
    def initial_seed():
        train.set_up(flags.parse_flags([*argv, "--seed", "4"]))
        return torch.initial_seed()

    first, second = in_processes(initial_seed, 2, tmp_path)
    assert first == 4 and second != 4


# ------------------------------------------------------------------------------------------ scoring


def all_scores(batches):
    """Of every proxy and of single ranks, at a generic point, with every kind of module."""
    model = tiny.adapted("bert", shortcuts=lora.SHORTCUTS["all"])
    tiny.randomise([a.lora_B for a in lora.adapters(model).values()], std=0.8)
    # what the model says, so that turning a branch down costs accuracy
    batches = [{**b, "labels": model(**b).logits.argmax(-1)} for b in batches]
    scores = {name: proxies.score(name, model, batches) for name in proxies.PROXIES}
    ranks = rank_scores.score_ranks("grad_norm", model, batches)
    language = tiny.adapted("gpt2", head="lm")  # a mean over tokens, not over rows
    tokens = [tiny.batch(language.config, seed, (7, 3 + seed)) for seed in range(len(batches))]
    return {**scores, "ranks": ranks, "tokens": proxies.score("grad_norm", language, tokens)}


@pytest.mark.parametrize("count", [1, 3], ids=["fewer batches than processes", "three batches"])
def test_every_proxy_scores_the_same_on_two_processes(tmp_path, count):
    """Batches of 3, 2 and 4 examples: shares that differ in batches and in examples."""
    lengths = [(9, 4, 6), (5, 8), (3, 7, 9, 2)][:count]
    batches = [tiny.batch(tiny.config("bert"), seed, t) for seed, t in enumerate(lengths)]
    one = all_scores(batches)
    first, second = in_processes(lambda: all_scores(batches), 2, tmp_path)
    assert first == second  # to the bit
    torch.testing.assert_close(first, one, rtol=1e-10, atol=1e-10)
    del one["constant"]
    trivial = () if count > 1 else ("alpha_test", "alpha_test_released")  # too few to lose any
    for name in one.keys() - trivial:
        assert len(set(map(str, one[name].values()))) > 1, name


def test_each_batch_is_scored_by_one_process(tmp_path):
    """Of five the second process has two, and repeats one of the first's to keep step."""
    batches = [tiny.batch(tiny.config("bert"), seed) for seed in range(5)]

    def forwards(name):
        model, count = tiny.adapted("bert"), []
        model.register_forward_hook(lambda *_: count.append(1))
        proxies.score(name, model, batches)
        return len(count)

    def of_each():
        return [forwards(name) for name in ("grad_norm", "snip", "grasp", "fisher")]

    first, second = in_processes(of_each, 2, tmp_path)
    assert first == second == [3, 3, 6, 8]  # grasp: twice; fisher: 15 examples, one by one


@pytest.mark.parametrize("proxy", ["constant", "random"])
def test_random_choices_are_the_same_on_two_processes(argv, tmp_path, proxy):
    def decisions():
        run = train.set_up(flags.parse_flags([*argv, "--proxy", proxy, "--keep", "0.4"]))
        for _ in range(4):
            train.decide(run)
        return [sorted(n for n, on in h["on"].items() if on) for h in run.plan.history]

    one = decisions()
    assert in_processes(decisions, 2, tmp_path) == [one, one]
    assert len(set(map(tuple, one))) > 1


# --------------------------------------------------------------------------------- failing together


def test_what_one_process_cannot_do_none_does(tmp_path):
    def fail(*who):
        try:
            with distributed.together():
                if distributed.rank() in who:
                    raise FileNotFoundError(f"nothing in {distributed.rank()}")
        except (ValueError, OSError) as error:
            return type(error).__name__, str(error)

    def cases():
        return [fail(0), fail(1), fail(0, 1), fail()]

    first, second = in_processes(cases, 2, tmp_path)
    zero, one = ("FileNotFoundError", "nothing in 0"), ("FileNotFoundError", "nothing in 1")
    assert first == [zero, ("ValueError", "process 1: nothing in 1"), zero, None]
    assert second == [("ValueError", "process 0: nothing in 0"), one, one, None]


def test_bad_input_is_said_once_by_the_first_process(argv, tmp_path, capfd):
    """A filled --out is seen by process 0 alone, a wrong flag by each."""
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "notes").write_text("mine")

    ports = [str(free_port() + i) for i in (1, 2)]  # a group that ends may still hold its own

    def codes():
        filled = train.main([*argv, "--out", str(tmp_path / "filled")])
        left = dist.is_initialized()  # main leaves the group that it joined
        os.environ["MASTER_PORT"] = ports[0]
        distributed.start()
        wrong = train.main([*argv, "--no-such-flag"])
        os.environ["MASTER_PORT"] = ports[1]
        distributed.start()
        return filled, wrong, left

    assert in_processes(codes, 2, tmp_path) == [(2, 2, False), (0, 0, False)]
    out, err = capfd.readouterr()
    # torch may warn, with its own stack, that the process which held the store has ended
    lines = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert out == "" and len(lines) == 2 and "Traceback" not in err
    assert "is not empty" in lines[0] and "--no-such-flag" in lines[1]
    assert [p.name for p in (tmp_path / "filled").iterdir() if p.name != "lock"] == ["notes"]


def test_a_process_that_ends_is_noticed_by_the_others(tmp_path):
    def survive():
        if distributed.rank() == 1:
            distributed.stop()
            return "gone"
        try:
            distributed.sum_numbers([1.0])
        except ConnectionError as error:
            return str(error)

    assert in_processes(survive, 2, tmp_path) == ["another process has ended", "gone"]


@pytest.mark.parametrize("moment", ["after the sum", "last checkpoint"])
def test_one_process_is_asked_to_stop_and_all_do(argv, tmp_path, monkeypatch, moment):
    """In the second one, where the first has no more word of it: both stop a step later, or say so.

    Before the sum: test_a_run_goes_on_with_another_number_of_processes.
    """
    begin, save, out = train.train_step, train.runs.save, tmp_path / "run"

    def asked(run):
        if run.step == 10 and distributed.rank() == 1:
            run.asked_to_stop = True
        save(run)

    def stepped(run, group, lr):
        run.optimizer.step = lambda: setattr(run, "asked_to_stop", distributed.rank() == 1)
        return begin(run, group, lr)

    if moment == "last checkpoint":
        monkeypatch.setattr(train.runs, "save", asked)
    else:
        monkeypatch.setattr(train, "train_step", stepped)
    words = [*argv, "--epochs", "2", "--out", str(out)]
    assert in_processes(lambda: train.main(words), 2, tmp_path) == [130, 0]
    stopped = checkpoint.read_last(out)[0]["position"]["step"]
    assert stopped == (10 if moment == "last checkpoint" else 2)
    assert not (out / "adapter.safetensors").exists()


def test_processes_without_torchrun_stop_together(argv, tmp_path, monkeypatch):
    """The parent of one of them is another process than it was: its torchrun was killed."""
    run = train.set_up(flags.parse_flags(argv))

    def stops():
        before = (distributed.orphaned(), run.stop)
        if distributed.rank() == 1:
            monkeypatch.setattr(os, "getppid", lambda: 1)
        train.train_step(run, [[0, 1, 2]], 0.1)
        return *before, run.stop

    assert in_processes(stops, 2, tmp_path) == [(False, False, True)] * 2


# ---------------------------------------------------------------------- another number of processes


@pytest.fixture
def in_float64(monkeypatch):
    """Runs of train.main in float64, in which rounding is 1e-10 at the end."""
    load = train.load_pretrained

    def double(*args, **kwargs):
        model, tokenizer = load(*args, **kwargs)
        return model.double(), tokenizer

    monkeypatch.setattr(train, "load_pretrained", double)


def stopped_at(step, who, *words):
    """train.main that is asked to stop, in one of the processes, while it takes a step."""
    begin = train.train_step

    def asked(run, group, lr):
        run.asked_to_stop = run.step == step - 1 and distributed.rank() == who
        return begin(run, group, lr)

    train.train_step = asked
    try:
        return train.main(list(words))
    finally:
        train.train_step = begin


@pytest.mark.parametrize("method", ["heterolora", "delta"])
def test_a_run_goes_on_with_another_number_of_processes(argv, tmp_path, method, in_float64, capfd):
    """2 processes to step 3, 1 to step 7, 3 to the end: as one that was never stopped."""
    argv += [*METHODS[method].split(), "--epochs", "2", "--log-every", "1"]
    one, out = tmp_path / "one", tmp_path / "out"
    assert train.main([*argv, "--out", str(one)]) == 0
    capfd.readouterr()
    codes = in_processes(lambda: stopped_at(3, 1, *argv, "--out", str(out)), 2, tmp_path)
    assert codes == [130, 0] and "processes began" not in capfd.readouterr().out
    assert stopped_at(7, 0, "--resume", str(out)) == 130
    assert capfd.readouterr().out.count("2 processes began, 1 goes on") == 1
    assert in_processes(lambda: train.main(["--resume", str(out)]), 3, tmp_path) == [0, 0, 0]
    assert capfd.readouterr().out.count("1 process began, 3 go on") == 1
    a, b = checkpoint.read_last(one)[0], checkpoint.read_last(out)[0]
    for key in ("parameters", "optimizer", "on", "position", "delta"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-9)
    logs = [[e["loss"] for e in run_folder.read_log(f) if "loss" in e] for f in (one, out)]
    assert len(logs[0]) == len(logs[1]) == 10
    torch.testing.assert_close(*logs, rtol=0, atol=1e-10)
    capfd.readouterr()
    assert train.main(["--resume", str(out), "--eval-only"]) == 0  # three trained, one evaluates
    said = capfd.readouterr().out
    assert train.report.show(a["metrics"]["last"]) in said and "began" not in said


def test_a_process_that_was_not_there_draws_dropout_of_its_own(argv, tmp_path):
    """The first goes on where it stood; the others begin anew, not as a run does that starts."""
    run = train.set_up(flags.parse_flags([*argv, "--dropout", "0.1"]))
    torch.rand(7)
    state = checkpoint.capture(run.model, run.optimizer, run.plan, run.delta)
    state |= {"position": {"step": 5}, "generators": [checkpoint.random_state(run.device)]}
    expected = torch.rand(3)

    def draws():
        run = train.set_up(flags.parse_flags([*argv, "--dropout", "0.1"]))
        fresh = torch.rand(3)
        torch.manual_seed(distributed.rank())
        checkpoint.restore(state, run.model, run.optimizer, run.plan, run.delta, run.device, 0)
        return fresh, torch.rand(3)

    drawn = in_processes(draws, 3, tmp_path)
    assert torch.equal(drawn[0][1], expected)
    assert len({str(numbers) for pair in drawn for numbers in pair}) == 6
    again = in_processes(draws, 2, tmp_path)
    assert torch.equal(drawn[1][1], again[1][1])  # of a process, whatever others there are


# ------------------------------------------------------------------------------------------ devices


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs, as far as pick_device can see; what was done, in order."""
    done, empty = [], torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: done.append(("current", str(d))))

    def put(*size, device):
        done.append(("put", str(device)))
        return empty(*size)

    monkeypatch.setattr(distributed.torch, "empty", put)
    return done


def test_each_process_gets_its_gpu_before_anything_is_put_on_one(gpus, monkeypatch):
    assert str(distributed.pick_device("auto")) == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    gpus.clear()
    for name in ("auto", "cuda"):
        assert str(distributed.pick_device(name)) == "cuda:1"
    assert gpus == [("current", "cuda:1"), ("put", "cuda:1")] * 2
    assert str(distributed.pick_device("cpu")) == "cpu"
    with pytest.raises(ValueError, match="cuda:0 is one GPU for 2 processes: give --device cuda"):
        distributed.pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"4 processes here, .* 2 GPUs: start as many"):
        distributed.pick_device("auto")


def test_the_backend_follows_the_device(gpus, monkeypatch, tmp_path):
    """GPUs in the machine change nothing for tensors on the CPU, nor for objects."""
    groups = []
    monkeypatch.setattr(dist, "new_group", lambda backend: groups.append(backend) or "GPUs")

    def of_kinds():
        distributed.sum_tensors([torch.ones(3)])
        before = list(groups)
        return before, [distributed.group(d) for d in ("cuda", "cpu", "cuda")], groups

    expected = ([], ["GPUs", None, "GPUs"], ["nccl"])
    assert in_processes(lambda: (dist.get_backend(), of_kinds()), 2, tmp_path) == [
        ("gloo", expected),
        ("gloo", expected),
    ]


def test_processes_that_do_not_meet_are_one_line(monkeypatch, capsys):
    def in_use(_backend):
        raise RuntimeError("EADDRINUSE: address already in use\nException raised from …")

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(dist, "init_process_group", in_use)
    assert train.main(["--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "the processes do not meet: EADDRINUSE" in error and error.count("\n") == 1


def test_one_process_exchanges_nothing():
    assert distributed.world() == 1 and distributed.rank() == 0
    assert distributed.share([1, 2, 3]) == [1, 2, 3]
    assert distributed.gather("x") == ["x"]
    tensors, numbers = [torch.ones(2)], [1.5, [2.0]]
    assert distributed.sum_tensors(tensors) is tensors
    assert distributed.sum_numbers(numbers) is numbers
    assert distributed.command() == "python" and not distributed.orphaned()
    parameter = torch.nn.Parameter(torch.ones(2))
    assert distributed.sum_gradients([parameter], 1.5, 0.0) == [1.5, 0.0]
    assert parameter.grad is None
