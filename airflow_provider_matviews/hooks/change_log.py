"""What one can ask of the change log from Airflow. No SQL of its own."""

from __future__ import annotations

from airflow_provider_matviews.checks import check_flag
from airflow_provider_matviews.hooks.record import RecordHook
from airflow_provider_matviews.services import change_log
from airflow_provider_matviews.services.change_log import ChangeLogResponse, LoggedTable
from airflow_provider_matviews.services.locking import Patience
from airflow_provider_matviews.timeouts import Timeouts


class ChangeLogHook(RecordHook):
    """Put the triggers of the change log on the tables that views read, look at them, and take them away.

    Its arguments are described where people make one, in ``matview.py``.
    """

    def install_change_log(
        self,
        *names: str,
        bell: bool = False,
        lock_timeout: float | None = None,
        max_wait: float | None = None,
        dry_run: bool = False,
    ) -> ChangeLogResponse:
        """Have every change of the tables that views read logged from now on, by a trigger on each of them.

        What is so already is left alone, so that this can be run again whenever a partition has been added. Views that
        read a table that was not logged before count as stale until their next refresh.

        :param names: views, for all tables they read, or tables; each with its partitions, children and parents.
        :param bell: also NOTIFY, which wakes the watchers at once and makes busy writers slower.
        :param lock_timeout: seconds for which writers to a table may queue behind one attempt to lock it; None for 1.
        :param max_wait: seconds after which waiting for a lock ends in failure; None for 600.
        :param dry_run: only find out what would be done.
        :returns: the statements, the tables, and of which tables changes are not all logged.
        :raises InvalidDefinition: when there is no name, or one of something that is neither.
        :raises ViewNotFound: when nothing of such a name stands.
        :raises MissingPrivilege: when the role lacks TRIGGER on a table, or may not make the function.
        :raises psycopg.errors.LockNotAvailable: when a table was not to be had; those before it are done.
        """
        check_flag(bell, "bell")
        check_flag(dry_run, "dry_run")
        patience = Patience.of(Timeouts(lock_timeout=lock_timeout, max_wait=max_wait))
        return self._run(change_log.install(self.tracking_schema, names, bell=bell, patience=patience, dry_run=dry_run))

    def remove_change_log(
        self, *names: str, lock_timeout: float | None = None, max_wait: float | None = None, dry_run: bool = False
    ) -> ChangeLogResponse:
        """Drop the triggers of the change log, and what it has of their tables.

        :param names: views, for all tables they read, or tables; none for every table that has one.
        :param lock_timeout: as in :meth:`install_change_log`; readers wait too, for DROP TRIGGER locks them out.
        :param max_wait: likewise.
        :param dry_run: only find out what would be done.
        :raises ViewNotFound: when nothing of such a name stands.
        :raises MissingPrivilege: when the role does not own a table.
        :raises psycopg.errors.LockNotAvailable: when a table was not to be had; those before it are done.
        """
        check_flag(dry_run, "dry_run")
        patience = Patience.of(Timeouts(lock_timeout=lock_timeout, max_wait=max_wait))
        return self._run(change_log.remove(self.tracking_schema, names or None, patience=patience, dry_run=dry_run))

    def change_log(self, *names: str) -> list[LoggedTable]:
        """Return the tables that views read, and which of their changes are logged; ``gap`` says what is not.

        :param names: views, for all tables they read, or tables; none for every table that is logged or that a view on
            record reads.
        :raises ViewNotFound: when nothing of such a name stands.
        """
        return self._read(change_log.show(self.tracking_schema, names or None))

    def prune_change_log(self, *, max_wait: float = 60.0) -> int:
        """Delete what the change log no longer needs, as a watcher does by itself; return how many rows.

        :param max_wait: seconds to wait for the transactions that are running now.
        :raises InvalidDefinition: when it is not a positive number.
        """
        longest = Timeouts(max_wait=max_wait).max_wait
        return self._run(change_log.prune_all(self.tracking_schema, longest or 0.0))
