"""What SLURM tells a process, and where the processes of a step meet."""

from __future__ import annotations

import pytest

from slurm.environment import (
    expand_counts,
    host_suffix,
    is_in_job,
    is_in_step,
    master_address,
    master_ports,
    read_task,
)

STEP = {
    "SLURM_CLUSTER_NAME": "booster",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "jwb[0001-0004]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "jwb[0002-0003]",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
"""Task 4 of a step on the second and third node of a job."""
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "6", "SLURM_JOB_NODELIST": "jwb[0001-0004]"}


def test_a_task_knows_its_place_in_the_step_not_in_the_job():
    task = read_task(STEP)
    assert task is not None
    assert (task.rank, task.local_rank, task.world_size) == (4, 0, 6)
    assert task.nodes == ("jwb0002", "jwb0003")
    assert (task.node, task.tasks_on_node) == ("jwb0003", 2)
    assert task.identity == "booster/job 4711 step 0 restart 0"


def test_a_batch_script_is_in_a_job_and_in_no_step():
    assert (is_in_job(BATCH), is_in_step(BATCH), read_task(BATCH)) == (True, False, None)
    assert (is_in_job({}), is_in_step({}), read_task({})) == (False, False, None)
    assert (is_in_job(STEP), is_in_step(STEP)) == (True, True)


def test_names_of_older_releases_are_read():
    new = {"SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"}
    old = {"SLURM_STEPID": "0", "SLURM_NODELIST": "n1,n2", "SLURM_NTASKS": "6", "SLURM_TASKS_PER_NODE": "3(x2)"}
    step = {name: value for name, value in STEP.items() if name not in new | {"SLURM_JOB_NODELIST"}} | old
    task = read_task(step)
    assert task is not None
    assert (task.nodes, task.tasks_per_node, task.world_size) == (("n1", "n2"), (3, 3), 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_NODEID": "2"}, r"SLURM_NODEID=2, 2 node\(s\) in the step's list and 2 in"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4"}, "2 node.* and 1 in SLURM_STEP_TASKS_PER_NODE: variables of another step"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x"}, r"tasks per node '4\(x': '4\(x' is neither a number nor"),
        ({"SLURM_LOCALID": ""}, "SLURM_STEP_ID=0.*SLURM_LOCALID is not set: something between srun and Python removes"),
        ({"SLURM_STEP_NUM_TASKS": "six"}, "SLURM_STEP_NUM_TASKS='six' is not a whole number: .* leave them alone"),
        ({"SLURM_STEP_NODELIST": "jwb[0002-"}, "is not closed"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_task(STEP | change)


def test_tasks_per_node_are_counted():
    assert expand_counts("4(x3),2,1(x2)") == (4, 4, 4, 2, 1, 1)


@pytest.mark.parametrize(
    ("setting", "system", "suffix"),
    [
        ("auto", "juwelsbooster", "i"),
        ("auto", "juwels", "i"),
        ("auto", "jurecadc", "i"),
        ("auto", "jusuf", "i"),
        ("auto", "jedi", ""),
        ("auto", None, ""),
        ("", "juwelsbooster", ""),
        ("i", None, "i"),
    ],
)
def test_a_host_gets_its_suffix_where_jsc_needs_it(setting, system, suffix):
    assert host_suffix(setting, {} if system is None else {"SYSTEMNAME": system}) == suffix


def test_the_step_meets_on_its_own_first_node():
    task = read_task(STEP)
    assert task is not None
    assert master_address(task, suffix="") == "jwb0002"
    assert master_address(task, suffix="i") == "jwb0002i"
    domain = read_task(STEP | {"SLURM_STEP_NODELIST": "n[1-2].example.org"})
    assert domain is not None
    assert master_address(domain, suffix="i") == "n1i.example.org"


@pytest.mark.parametrize(
    "other",
    [{"SLURM_JOB_ID": "4712"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_CLUSTER_NAME": "jureca"}],
)
def test_another_job_step_or_restart_has_other_ports_and_another_identity(other):
    task, stranger = read_task(STEP), read_task(STEP | other)
    assert task is not None
    assert stranger is not None
    assert task.identity != stranger.identity
    assert not set(master_ports(task)) & set(master_ports(stranger))


def test_all_tasks_of_a_step_agree_on_its_ports():
    tasks = [read_task(STEP | {"SLURM_PROCID": str(rank)}) for rank in range(6)]
    ports = {master_ports(task) for task in tasks if task is not None}
    assert len(ports) == 1
    assert all(20_000 <= port < 60_000 for port in ports.pop())
