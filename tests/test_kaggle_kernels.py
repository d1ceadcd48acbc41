"""Steps on Kaggle, against a Kaggle of this machine: the `kaggle` package is the real one, its server is ours.

The server keeps what is pushed, runs it with papermill in a folder laid out as `/kaggle`, and hands out what is left in
`/kaggle/working`.
"""

import functools
import http.server
import json
import os
import re
import shutil
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import papermill
import pytest
import requests
import torch
from conftest import ROOT

from stgan_utils import __main__ as cli
from stgan_utils import (
    checkpoints,
    config,
    data,
    download,
    kaggle_kernels,
    kaggle_session,
    pipeline,
    runs,
    steps,
    trainer,
)
from stgan_utils.classifier import Classifier
from stgan_utils.config import UserError

START, BASELINE, STAGE1 = (step.name for step in pipeline.STEPS[:3])
LENGTH = {"stage1.iterations": 10, "checkpoint_every": 6, "evaluate_every": 10}


class Kaggle:
    """A server's memory: {kernel: what was pushed, how it ended, folder of its output}."""

    def __init__(self, root, dataset):
        self.root, self.dataset, self.kernels, self.refusal = root, dataset, {}, None

    # What kagglesdk's client of the kernels' service answers.

    def save_kernel(self, request):
        from kagglesdk.kernels.types.kernels_api_service import ApiSaveKernelResponse

        if self.refusal:
            raise self.refusal
        answer = ApiSaveKernelResponse()
        complete = [name for name, kernel in self.kernels.items() if kernel.output]
        answer.invalid_kernel_sources = [name for name in request.kernel_data_sources if name not in complete]
        answer.url = f"https://www.kaggle.com/code/{request.slug}"
        before = self.kernels.get(request.slug)
        output = before and before.output
        self.kernels[request.slug] = SimpleNamespace(request=request, status="QUEUED", output=output, message=None)
        return answer

    def get_kernel_session_status(self, request):
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelSessionStatusResponse
        from kagglesdk.kernels.types.kernels_enums import KernelWorkerStatus

        answer, kernel = ApiGetKernelSessionStatusResponse(), self._kernel(request)
        answer.status, answer.failure_message = KernelWorkerStatus[kernel.status], kernel.message
        return answer

    def list_kernel_files(self, request):
        names = os.listdir(self._kernel(request).output)
        return SimpleNamespace(files=[SimpleNamespace(name=name) for name in names], next_page_token="")

    def list_kernel_session_output(self, request):
        slug = f"{request.user_name}/{request.kernel_slug}"
        output = self._kernel(request).output
        listed = [SimpleNamespace(file_name=n, url=f"{self.address}/{slug}/{n}") for n in os.listdir(output)]
        return SimpleNamespace(files=listed, log="[]", next_page_token="")

    def _kernel(self, request):
        slug = f"{request.user_name}/{request.kernel_slug}"
        if slug not in self.kernels:
            raise requests.HTTPError("404 Client Error", response=SimpleNamespace(status_code=404))
        return self.kernels[slug]

    # What happens to a kernel that waits.

    def work(self, by=None):
        """Runs what waits; `by` stands in for papermill. A session that failed leaves no output."""
        for slug, kernel in self.kernels.items():
            if kernel.status == "QUEUED":
                shutil.rmtree(self.root / "kaggle", ignore_errors=True)
                working, mounts = self.root / "kaggle" / "working", self.root / "kaggle" / "input"
                working.mkdir(parents=True)
                shutil.copytree(self.dataset, mounts / "datasets" / "kmader" / "skin-cancer-mnist-ham10000")
                for source in kernel.request.kernel_data_sources:
                    shutil.copytree(self.kernels[source].output, mounts / "notebooks" / source)
                pushed = self.root / "pushed.ipynb"
                pushed.write_text(kernel.request.text.replace("/kaggle/", f"{self.root}/kaggle/"))
                try:
                    by(working / "run") if by else papermill.execute_notebook(
                        str(pushed), str(working / "__notebook__.ipynb"), progress_bar=False, cwd=str(working)
                    )
                except papermill.PapermillExecutionError as error:
                    kernel.status, kernel.message = "ERROR", error.evalue
                    continue
                kernel.status, kernel.output = "COMPLETE", self.root / "output" / slug
                shutil.rmtree(kernel.output, ignore_errors=True)
                shutil.move(working, kernel.output)


@pytest.fixture
def kaggle(tmp_path, phantom_dir, monkeypatch):
    monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
    monkeypatch.setenv("KAGGLE_KEY", "0" * 32)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "no-token-here"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the package as if installed
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # which decides the order of sums
    from kaggle.api.kaggle_api_extended import KaggleApi

    (tmp_path / "output").mkdir()
    server = Kaggle(tmp_path, phantom_dir)

    @contextmanager
    def client(_):
        yield SimpleNamespace(kernels=SimpleNamespace(kernels_api_client=server))

    monkeypatch.setattr(KaggleApi, "build_kaggle_client", client)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "output"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        server.address = f"http://127.0.0.1:{served.server_port}"
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield server
        served.shutdown()


def command(monkeypatch, *words):
    """The command line, in this process."""
    monkeypatch.setattr("sys.argv", ["stgan_utils", "kaggle", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


asks_for_gpus = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="the newest kaggle package for Python 3.10 cannot ask for T4 × 2"
)


@asks_for_gpus
def test_a_session_cut_in_the_middle_of_stage_1_changes_nothing(kaggle, tmp_path, phantom_dir, monkeypatch, capsys):
    out = tmp_path / "here" / "run"
    pairs = [word for key, value in LENGTH.items() for word in ("-p", key, value)]
    push = ("push", "--run", out, "--profile", "smoke", *pairs)

    assert command(monkeypatch, *push) == 0
    assert list(kaggle.kernels) == ["somebody/stgan-run-00-start-here"]
    assert f"{STAGE1}: waits for {START} (not pushed), {BASELINE} (not pushed)" in capsys.readouterr().out
    assert kaggle_kernels.status(out) == {START: "queued"}
    kaggle.work()
    assert kaggle_kernels.status(out) == {START: "done"}
    assert os.listdir(kaggle.kernels["somebody/stgan-run-00-start-here"].output) == [
        "__notebook__.ipynb",
        f"{START}.zip",
    ]

    command(monkeypatch, *push)
    assert capsys.readouterr().out.startswith(f"{START}: done, left alone\n{BASELINE}: pushed, https://")
    kaggle.work(by=baseline)

    # The first session has no time beyond its first checkpoint, at iteration 6 of 10; the second has the usual time.
    kaggle_kernels.push("02", out, profile="smoke", params={**LENGTH, "max_minutes": 0})
    kaggle.work()
    slug = "somebody/stgan-run-02-stage1-global-gan"
    assert kaggle.kernels[slug].status == "COMPLETE"
    assert kaggle.kernels[slug].request.machine_shape == "NvidiaTeslaT4"
    assert "Stopped at iteration 6 of 10" in (kaggle.kernels[slug].output / "__notebook__.ipynb").read_text()
    assert kaggle_kernels.status(out)[STAGE1] == "unfinished"
    with pytest.raises(
        UserError, match=rf"03_stage2_AKIEC waits for {STAGE1} \(unfinished\) on Kaggle: push that first"
    ):
        kaggle_kernels.push("03", out, profile="smoke")

    # Brought here, it can go on here as well.
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(out, elsewhere)
    command(monkeypatch, "pull", "--run", elsewhere, "--data", phantom_dir)
    assert f"{STAGE1}: unfinished, brought" in capsys.readouterr().out
    assert not runs.result(elsewhere, STAGE1)
    brought = elsewhere / STAGE1 / "checkpoint.safetensors"
    assert checkpoints.read_header(brought)["iteration"] == 6
    # What has come further here meanwhile is not written over, nor what another program is at.
    before, (tensors, header) = brought.read_bytes(), checkpoints.load(brought)
    checkpoints.save(brought, tensors, header | {"iteration": 8})
    command(monkeypatch, "pull", "--run", elsewhere, "--data", phantom_dir)
    assert f"{STAGE1}: unfinished, as far here, left alone" in capsys.readouterr().out
    assert checkpoints.read_header(brought)["iteration"] == 8
    with pipeline.alone_in(elsewhere):
        assert command(monkeypatch, "pull", "--run", elsewhere, "--data", phantom_dir) == 2
    assert "Another run works in" in capsys.readouterr().err
    brought.write_bytes(before)

    kaggle_kernels.push("02", out, profile="smoke", params=LENGTH)
    assert slug in kaggle.kernels[slug].request.kernel_data_sources
    kaggle.work()
    command(monkeypatch, "pull", "--run", out, "--data", phantom_dir)
    assert {path.name for path in out.iterdir()} == {".lock", "kaggle", START, BASELINE, STAGE1}
    capsys.readouterr()
    pipeline.run(phantom_dir, "smoke", out, only="02", params=LENGTH)
    assert "done before, skipped" in capsys.readouterr().out
    table = data.read_table(out / START / "table.csv")
    assert table["path"].str.startswith(str(phantom_dir)).all()

    settings = config.resolve("stage1", "smoke", {key.split(".")[-1]: value for key, value in LENGTH.items()})
    images = data.image_cache(table[table["split"] == "train"], settings.size)
    steps.open_step(STAGE1, settings, phantom_dir, elsewhere, "smoke", (START, BASELINE))
    folders = [out / STAGE1, elsewhere / STAGE1, tmp_path / "undisturbed"]
    for folder in folders[1:]:
        trainer.GanTrainer(settings, images, folder).run()
    for name in ("checkpoint.safetensors", "generator.safetensors"):
        on_kaggle, here, whole = (checkpoints.load_generator(folder / name).state_dict() for folder in folders)
        assert all(torch.equal(on_kaggle[key], t) and torch.equal(here[key], t) for key, t in whole.items())


def baseline(run_dir):
    """Step 01 in a moment: what matters here is what it leaves and where."""
    mounts = run_dir.parents[1] / "input"
    (archive,) = mounts.glob("notebooks/*/*/*.zip")
    (run_dir / START).mkdir(parents=True)
    download.unzip(archive, run_dir / START)
    images = next(mounts.glob("datasets/*/*"))
    step = steps.open_step(BASELINE, config.resolve("baseline", "smoke"), str(images), run_dir, "smoke", (START,))
    Classifier({"size": 64, "mean": [0.5] * 3, "std": [0.5] * 3}).save(step.folder / "model.safetensors")
    step.finish({}, "")
    kaggle_session.end_session(BASELINE, run_dir)


# --- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "here" / "run"


def pushed(kaggle, run_dir, status, message=None, files=()):
    """Step 00, pushed and ended; `files` are its output: {name: what to write with}."""
    kaggle_kernels.push("00", run_dir, profile="smoke")
    (kernel,) = kaggle.kernels.values()
    kernel.status, kernel.message = status, message
    kernel.output = kaggle.root / "output" / "somebody" / "stgan-run-00-start-here"
    kernel.output.mkdir(parents=True)
    for name, content in dict(files).items():
        (kernel.output / name).write_bytes(content)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("push", "9"), "No step '9'; there are all, 00_start_here, "),
        (("push", "00", "--no-internet"), "name a data set that holds it"),
        (("push", "00", "--profile", "fast"), "No profile 'fast'"),
        (("push", "00", "-p", "iteratoins", "3"), "No step has a setting 'iteratoins'"),
        (("push", "00", "--dataset", "ham10000"), "it must be OWNER/NAME"),
        (("push", ""), "No step ''"),
        (("push", "03", "-p", "start_from", __file__), "it lies below /kaggle/"),
        (("push", "02"), "02_stage1_global_gan waits for 00_start_here (not pushed), 01_baseline (not pushed)"),
        (("status",), "Nothing was pushed to Kaggle from "),
        (("pull", "00", "--data", "."), "Nothing was pushed to Kaggle from "),
        (("pull", "00", "--data", "no/such/folder"), "There is no "),
    ],
)
def test_wrong_input_is_one_sentence(kaggle, run_dir, monkeypatch, capsys, words, sentence):
    assert command(monkeypatch, *words, "--run", run_dir) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not said.out
    assert not kaggle.kernels and not list(run_dir.rglob("*.ipynb"))


def test_a_name_too_long_for_a_later_step_is_told_before_the_first_is_sent(kaggle, tmp_path):
    with pytest.raises(UserError, match=r"Kaggle allows 50 letters and .*02.* has 53: rename the run folder"):
        kaggle_kernels.push("all", tmp_path / "ham10000-kaggle-2026-11-27", profile="smoke")
    assert not kaggle.kernels


def test_without_a_token_one_sees_what_would_be_sent(kaggle, run_dir, monkeypatch, capsys):
    monkeypatch.delenv("KAGGLE_USERNAME")
    with pytest.raises(UserError, match="Kaggle wants an API token"):
        kaggle_kernels.push("all", run_dir)
    command(monkeypatch, "push", "--run", run_dir, "--dry-run", "--package", "me/stgan", "--no-internet")
    shown = capsys.readouterr().out
    sent = {
        text.split(":")[0]: json.loads(text[text.index("{") : text.index("parameters: ")]) for text in blocks(shown)
    }
    assert list(sent) == [step.name for step in pipeline.STEPS]
    stage1, dedup, report = sent[STAGE1], sent["04_deduplicate"], sent["07_report"]
    assert stage1["dataset_sources"] == ["kmader/skin-cancer-mnist-ham10000", "me/stgan"]
    assert stage1["enable_gpu"] and stage1["machine_shape"] == "NvidiaTeslaT4" and not stage1["enable_internet"]
    assert not dedup["enable_gpu"] and "machine_shape" not in dedup
    assert report["kernel_sources"] == [values["id"] for values in list(sent.values())[:-1]]
    assert "'max_minutes': 500" in shown and "'data': '/kaggle/input/skin-cancer-mnist-ham10000'" in shown
    assert not run_dir.exists() and not kaggle.kernels


def blocks(shown):
    return [f"{name}: {{{rest}" for name, rest in re.findall(r"^(\d\d_\w+): \{(.*?^parameters: )", shown, re.M | re.S)]


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        (requests.ConnectionError("no route to host"), r"cannot be reached \(no route to host\): is there a network\?"),
        (
            requests.HTTPError("403 Client Error", response=SimpleNamespace(status_code=403)),
            "refuses .403 Client Error",
        ),
        (RuntimeError("Maximum batch GPU session count of 2 reached."), "Maximum batch GPU session count of 2"),
    ],
)
def test_a_push_that_fails_is_forgotten(kaggle, run_dir, refusal, sentence):
    kaggle.refusal = refusal
    with pytest.raises(UserError, match=sentence):
        kaggle_kernels.push("00", run_dir, profile="smoke")
    assert not any((run_dir / "kaggle").iterdir())
    kaggle.refusal = None
    kaggle_kernels.push("00", run_dir, profile="smoke")
    assert kaggle_kernels.status(run_dir) == {START: "queued"}


def test_a_package_that_cannot_ask_for_t4_pushes_no_training(kaggle, run_dir, monkeypatch):
    from kagglesdk.kernels.types.kernels_api_service import ApiSaveKernelRequest

    pushed(kaggle, run_dir, "COMPLETE", files={f"{START}.zip": b""})
    monkeypatch.delattr(ApiSaveKernelRequest, "machine_shape", raising=False)
    with pytest.raises(UserError, match=r"cannot ask for T4 × 2.*kaggle 1\.8\.4 or newer, which needs Python 3\.11\.$"):
        kaggle_kernels.push("all", run_dir, profile="smoke")
    assert len(kaggle.kernels) == 1 and os.listdir(run_dir / "kaggle") == [START]


def test_a_kernel_that_failed(kaggle, run_dir, phantom_dir, capsys):
    pushed(kaggle, run_dir, "ERROR", "Your notebook tried to allocate more memory than is available.")
    state = kaggle_kernels.status(run_dir)[START]
    assert state.startswith("failed: error (Your notebook tried") and state.endswith(
        "/code/somebody/stgan-run-00-start-here"
    )
    with pytest.raises(UserError, match=r"00_start_here has left nothing on Kaggle: failed: error"):
        kaggle_kernels.pull("00", run_dir, phantom_dir)
    kaggle_kernels.push("all", run_dir, profile="smoke")
    assert "once that is mended, push it by its name" in capsys.readouterr().out
    kaggle_kernels.push("00", run_dir, profile="smoke")
    assert kaggle_kernels.status(run_dir) == {START: "queued"}


def test_a_kernel_that_is_gone(kaggle, run_dir):
    pushed(kaggle, run_dir, "COMPLETE")
    assert kaggle_kernels.status(run_dir)[START].startswith("failed: it left no 00_start_here.zip")
    kaggle.kernels.clear()
    with pytest.raises(UserError, match=r"stgan-run-00-start-here: Kaggle refuses \(404 Client Error\): is it yours"):
        kaggle_kernels.status(run_dir)


def test_a_session_that_failed_does_not_cost_the_checkpoint_before_it(kaggle, run_dir):
    pushed(kaggle, run_dir, "COMPLETE", files={f"{START}.unfinished.zip": b""})
    for _ in range(2):
        kaggle_kernels.push("00", run_dir, profile="smoke")
        ((slug, kernel),) = kaggle.kernels.items()
        assert kernel.request.kernel_data_sources == [slug]
        kernel.status = "ERROR"


def archive_of_start(tmp_path, images):
    """Step 00 as a kernel leaves it, for images that lie at `images`."""
    there = tmp_path / "there" / "run"
    step = steps.open_step(START, config.resolve("data", "smoke"), images, there, "smoke")
    table = data.split_by_lesion(data.load_dataset(images))
    data.save_table(table, step.folder / "table.csv")
    step.finish({}, "")
    kaggle_session.end_session(START, there)
    return (tmp_path / "there" / f"{START}.zip").read_bytes()


def test_a_pull_that_fails_leaves_nothing(kaggle, run_dir, tmp_path, phantom_dir):
    shutil.copytree(phantom_dir, tmp_path / "images")
    whole = archive_of_start(tmp_path, tmp_path / "images")
    pushed(kaggle, run_dir, "COMPLETE", files={f"{START}.zip": whole[: len(whole) // 2]})
    archive = kaggle.root / "output" / "somebody" / "stgan-run-00-start-here" / f"{START}.zip"
    with pytest.raises(UserError, match=r"00_start_here\.zip is damaged"):
        kaggle_kernels.pull("all", run_dir, phantom_dir)
    archive.write_bytes(whole)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"other lacks 210 of the images: it must be laid out as .*images"):
        kaggle_kernels.pull("all", run_dir, tmp_path / "other")
    assert sorted(os.listdir(run_dir)) == [".lock", "kaggle"]

    # Work of another run is not written over.
    other = steps.open_step(START, config.resolve("data", "smoke", {"seed": 1}), phantom_dir, run_dir, "smoke")
    (other.folder / "table.csv").write_text("mine")
    with pytest.raises(UserError, match=r"belongs to a run with other settings \(seed 1 there, 0 asked for\)"):
        kaggle_kernels.pull("all", run_dir, phantom_dir)
    assert (other.folder / "table.csv").read_text() == "mine"
    shutil.rmtree(other.folder)

    kaggle_kernels.pull("all", run_dir, phantom_dir)
    assert runs.is_done(run_dir, START, config.resolve("data", "smoke"), str(phantom_dir))


@asks_for_gpus
def test_a_step_made_from_another_earlier_step_is_refused(kaggle, run_dir, tmp_path, phantom_dir):
    mounted = tmp_path / "kaggle" / "input" / "datasets" / "kmader" / "skin-cancer-mnist-ham10000"
    shutil.copytree(phantom_dir, mounted)
    pushed(kaggle, run_dir, "COMPLETE", files={f"{START}.zip": archive_of_start(tmp_path, mounted)})
    mine = steps.open_step(START, config.resolve("data", "smoke", {"seed": 1}), phantom_dir, run_dir, "smoke")
    mine.finish({}, "")
    kaggle_kernels.push("01", run_dir, profile="smoke")
    kaggle.work(by=baseline)
    with pytest.raises(UserError, match=r"01_baseline on Kaggle was made from other earlier steps than those in"):
        kaggle_kernels.pull("01", run_dir, phantom_dir)
    shutil.rmtree(mine.folder)
    with pytest.raises(UserError, match=r"01_baseline builds on 00_start_here, which is not in .*: pull that first"):
        kaggle_kernels.pull("01", run_dir, phantom_dir)
