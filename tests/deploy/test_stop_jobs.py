"""The hook that stops jobs before their pod ends."""

from types import SimpleNamespace

from deploy.stop_jobs import stop_jobs


class Client:
    """Jobs by id, each with the statuses that it is asked for one after another."""

    def __init__(self, **statuses):
        self.statuses, self.stopped = statuses, []

    def list_jobs(self):
        jobs = [SimpleNamespace(submission_id=name, status=each[0]) for name, each in self.statuses.items()]
        return [*jobs, SimpleNamespace(submission_id=None, status="RUNNING")]

    def stop_job(self, name):
        self.stopped.append(name)

    def get_job_status(self, name):
        left = self.statuses[name]
        return left.pop(0) if len(left) > 1 else left[0]


def test_it_waits_until_all_have_ended():
    client = Client(old=["SUCCEEDED"], run=["RUNNING", "RUNNING", "STOPPED"], other=["PENDING", "STOPPED"])
    assert stop_jobs(client, 60, sleep=lambda _: None) == []
    assert client.stopped == ["run", "other"], "drivers without a submission, and what has ended, are left alone"


def test_it_names_those_that_have_not():
    assert stop_jobs(Client(run=["RUNNING"]), 0.0, sleep=lambda _: None) == ["run"]
