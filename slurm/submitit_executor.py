"""Submits our batch script through submitit, for clusters and programs that are used to it.

submitit's own script would start pickled Python with one srun in the foreground, so that no signal reaches the batch
shell before the time limit, and would requeue on a time limit only. Therefore the executor sends our file; from then on
``submitit.SlurmJob(folder, job_id)`` knows the job's state, and cancels it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from slurm.batch_script import BatchJob

FOLDER = "slurm/submitit"
"""In the run directory: where submitit keeps what it has sent, by job."""


class ScriptExecutor(SlurmExecutor):
    """Sends a finished script; no function is pickled."""

    def __init__(self, folder: Path, *, script: str, options: Sequence[str], num_tasks: int) -> None:
        super().__init__(folder)
        self._script = script
        self._options = options
        self._tasks = num_tasks

    def send(self) -> str:
        """The number of the job."""
        return str(self._submit_command("").job_id)

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._script

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", *self._options, str(submission_file_path)]

    def _num_tasks(self) -> int:
        return self._tasks


def send_with_submitit(script: Path, job: BatchJob, options: Sequence[str] = ()) -> str:
    """Submits a script as it is.

    Raises:
        RuntimeError: there is no SLURM here, or it refuses the job.
    """
    folder = Path(job.run) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    num_tasks = job.nodes * job.tasks_per_node
    try:
        return ScriptExecutor(folder, script=script.read_text(), options=options, num_tasks=num_tasks).send()
    except (FailedJobError, FailedSubmissionError, RuntimeError) as error:
        raise RuntimeError(
            f"submitit could not submit {script}: {error}. Without --with submitit sbatch is used."
        ) from error
