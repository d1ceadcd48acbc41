"""The whole sequence on a real Ray cluster of two nodes, beside the one of this machine's processes."""

import re

from conftest import command

from stgan_utils import pipeline, runs


def test_on_two_nodes_of_a_ray_cluster_the_same_comes_out_bit_for_bit(smoke, cluster, tmp_path):
    cluster.add_node(num_cpus=1)
    out = tmp_path / "ray"
    words = ("--data", "phantom", "--profile", "smoke", "--out", out, "--engine", "ray", "--address", cluster.address)
    ran = command("stgan_utils", "run", *words)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    table = ran.stdout[ran.stdout.rindex("machine") :]
    assert all(re.search(rf"{step.name} .*done in", table) for step in pipeline.STEPS)
    for step in pipeline.STEPS:
        here, there = (runs.result(folder, step.name) for folder in (smoke, out))
        assert here["models"] == there["models"]
    made = sorted(path.relative_to(smoke) for path in smoke.glob("03_stage2_*/images/*.png"))
    assert len(made) == 6 * 24
    for file in (*made, "05_classifier/test_predictions.csv"):
        assert (smoke / file).read_bytes() == (out / file).read_bytes(), file
