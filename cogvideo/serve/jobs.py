"""The queue: a table of jobs in SQLite or PostgreSQL, from which workers take them under a lease.

    queued --take--> in_progress --finish--> completed
      ^                  |   `---fail---> failed
      `--- lease ends ---'

A job is stored before it is acknowledged. A worker holds it as long as it renews its lease; when that ends,
the job is queued again, and the next worker resumes from the last draft. Whatever a worker writes names its
lease, so one that lost its job changes nothing: no job has two results. Times are seconds since 1970, by the
clock of the database if it is PostgreSQL.
"""

import secrets
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    Select,
    String,
    Table,
    Text,
    and_,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from cogvideo.serve.request import VideoRequest

QUEUED, IN_PROGRESS, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
STATUSES = (QUEUED, IN_PROGRESS, COMPLETED, FAILED)
MAX_ATTEMPTS = 5  # of a job whose workers die
NEW_SECONDS = 3.0  # who asks looks first: previews are drawn from the start
TOMBSTONE_SECONDS = 3600.0  # a cancelled job can still be asked for

DatabaseError = SQLAlchemyError  # the database is gone, full, or locked

metadata = MetaData()
jobs = Table(
    "jobs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),  # the order of the queue
    Column("id", String(40), unique=True, nullable=False),
    Column("status", String(12), nullable=False),
    Column("deleted", Boolean, nullable=False, default=False),  # cancelled: known, but not listed
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("completed_at", Float),
    Column("expires_at", Float),
    Column("request", JSON, nullable=False),
    Column("group", Text, nullable=False),  # jobs of one group can be generated together
    Column("warnings", JSON, nullable=False),
    Column("remixed_from", String(40)),
    Column("progress", Integer, nullable=False, default=0),  # percent
    Column("stage", String(40), nullable=False, default=""),
    Column("frames", Integer, nullable=False, default=0),  # of the stored draft
    Column("attempts", Integer, nullable=False, default=0),
    Column("lease", String(48)),
    Column("leased_until", Float),
    Column("watched_until", Float, nullable=False, default=0.0),  # somebody looks at previews
    Column("error_code", String(40)),
    Column("error_message", Text),
    Column("bytes", Integer, nullable=False, default=0),  # of the results
    Index("by_status", "status", "number"),
    Index("by_lease", "lease"),
)
previews = Table(
    "previews",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("stage", String(40), nullable=False),
    Column("frames", Integer, nullable=False),
    Column("image", LargeBinary, nullable=False),
)


class QueueFull(Exception):
    """There are as many unfinished jobs as may wait; `retry_after` seconds are worth waiting."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class Job:
    number: int
    id: str
    status: str
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    request: VideoRequest
    warnings: list[str]
    remixed_from: str | None
    progress: int
    stage: str
    frames: int
    attempts: int
    error_code: str | None
    error_message: str | None

    @property
    def finished(self) -> bool:
        return self.status in (COMPLETED, FAILED)


@dataclass(frozen=True)
class Preview:
    """The frames so far, side by side in one picture."""

    version: int
    stage: str
    frames: int
    image: bytes


@dataclass(frozen=True)
class Batch:
    """Jobs that one worker holds."""

    lease: str
    jobs: list[Job]
    watched: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Held:
    """What a renewed lease still holds, and which of it somebody watches."""

    ids: frozenset[str] = frozenset()
    watched: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Counts:
    by_status: dict[str, int] = field(default_factory=dict)
    oldest_queued: float = 0.0  # seconds that it has waited
    result_bytes: int = 0


def new_id() -> str:
    return f"video_{secrets.token_hex(16)}"


class JobStore:
    """All that servers and workers know in common. `url` is one of SQLAlchemy's."""

    def __init__(self, url: str, *, max_queue: int = 1000, keep_seconds: float = 7 * 86400.0):
        self.engine = open_engine(url)
        self.max_queue = max_queue
        self.keep_seconds = keep_seconds
        self._postgres = self.engine.dialect.name == "postgresql"
        self._create_tables()

    def _create_tables(self) -> None:
        with self.engine.begin() as connection:
            if self._postgres:
                connection.execute(text("select pg_advisory_xact_lock(20852205)"))  # others start as well
            metadata.create_all(connection)

    # -- clients --

    def add(
        self, id: str, request: VideoRequest, warnings: Sequence[str], remixed_from: str | None = None
    ) -> Job:
        """Store a job, with an id of `new_id`; raise QueueFull if too many wait."""
        with self.engine.begin() as connection:
            now = self._now(connection)
            unfinished = self._count(connection, jobs.c.status.in_((QUEUED, IN_PROGRESS)))
            if unfinished >= self.max_queue:
                raise QueueFull(self._retry_after(connection))
            values = {
                "id": id,
                "status": QUEUED,
                "created_at": now,
                "watched_until": now + NEW_SECONDS,
                "request": asdict(request),
                "group": request.group,
                "warnings": list(warnings),
                "remixed_from": remixed_from,
            }
            connection.execute(insert(jobs).values(**values))
            row = connection.execute(select(jobs).where(jobs.c.id == id)).one()
        return _job(row)

    def get(self, id: str) -> Job | None:
        row = self._read(select(jobs).where(jobs.c.id == id)).one_or_none()
        return _job(row) if row else None

    def page(self, limit: int, after: str | None, newest_first: bool) -> tuple[list[Job], bool]:
        """Jobs behind `after`, and whether there are more; KeyError if that is unknown."""
        query = select(jobs).where(jobs.c.deleted.is_(False))
        if after is not None:
            position = self._read(select(jobs.c.number).where(jobs.c.id == after)).scalar_one_or_none()
            if position is None:
                raise KeyError(after)
            behind = jobs.c.number < position if newest_first else jobs.c.number > position
            query = query.where(behind)
        query = query.order_by(jobs.c.number.desc() if newest_first else jobs.c.number).limit(limit + 1)
        rows = self._read(query).all()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def remove(self, id: str) -> bool:
        """Cancel an unfinished job, or forget a finished one; False if there is none of this name.

        A cancelled job is failed for those who still ask for it, since clients wait for a state they know.
        """
        with self.engine.begin() as connection:
            now = self._now(connection)
            cancelled = connection.execute(
                update(jobs)
                .where(jobs.c.id == id, jobs.c.status.in_((QUEUED, IN_PROGRESS)))
                .values(
                    status=FAILED,
                    deleted=True,
                    lease=None,
                    completed_at=now,
                    expires_at=now + TOMBSTONE_SECONDS,
                    error_code="cancelled",
                    error_message="the job was cancelled",
                )
            )
            connection.execute(delete(previews).where(previews.c.id == id))
            if cancelled.rowcount:
                return True
            return bool(connection.execute(delete(jobs).where(jobs.c.id == id)).rowcount)

    def watch(self, id: str, seconds: float) -> None:
        """Ask for previews of a job for so many seconds."""
        with self.engine.begin() as connection:
            until = self._now(connection) + seconds
            connection.execute(update(jobs).where(jobs.c.id == id).values(watched_until=until))

    def preview(self, id: str, newer_than: int = 0) -> Preview | None:
        query = select(previews).where(previews.c.id == id, previews.c.version > newer_than)
        row = self._read(query).one_or_none()
        return Preview(row.version, row.stage, row.frames, row.image) if row else None

    def look(self, id: str, newer_than: int) -> tuple[Job | None, Preview | None]:
        """A job, and its preview if there is a newer one: one query, for those who look often."""
        newer = and_(previews.c.id == jobs.c.id, previews.c.version > newer_than)
        shown = (previews.c.version, previews.c.stage.label("shown_stage"), previews.c.frames.label("shown"))
        query = select(jobs, *shown, previews.c.image)
        query = query.select_from(jobs.outerjoin(previews, newer)).where(jobs.c.id == id)
        row = self._read(query).one_or_none()
        if row is None:
            return None, None
        preview = None
        if row.version is not None:
            preview = Preview(row.version, row.shown_stage, row.shown, row.image)
        return _job(row), preview

    def counts(self) -> Counts:
        with self.engine.connect().execution_options(reads=True) as connection:
            now = self._now(connection)
            rows = connection.execute(
                select(jobs.c.status, func.count(), func.min(jobs.c.created_at), func.sum(jobs.c.bytes))
                .where(jobs.c.deleted.is_(False))
                .group_by(jobs.c.status)
            ).all()
        by_status = dict.fromkeys(STATUSES, 0)
        oldest = 0.0
        size = 0
        for status, count, first, total in rows:
            by_status[status] = count
            size += int(total or 0)
            if status == QUEUED:
                oldest = max(0.0, now - first)
        return Counts(by_status, oldest, size)

    # -- workers --

    def take(self, most: Mapping[str, int], seconds: float, worker: str = "") -> Batch | None:
        """Lease the first job in line, of one of the models that `most` names, for so many seconds; with it
        others of its group, as many videos in all as `most` says. The lease begins with the worker's name."""
        waiting = select(jobs).where(jobs.c.status == QUEUED).order_by(jobs.c.number)
        lease = worker + secrets.token_hex(16)
        with self.engine.begin() as connection:
            now = self._now(connection)
            self._requeue(connection, now)
            mine = waiting.where(jobs.c.group.in_(_groups(connection, most)))
            first = connection.execute(mine.limit(1).with_for_update(skip_locked=True)).one_or_none()
            if first is None:
                return None
            like_it = waiting.where(
                jobs.c.group == first.group, jobs.c.frames == first.frames, jobs.c.number > first.number
            )
            rows = [first]
            videos = first.request["n"]
            limit = most[first.request["model"]]
            for row in connection.execute(like_it.limit(limit).with_for_update(skip_locked=True)):
                videos += row.request["n"]
                if videos > limit:
                    break
                rows.append(row)
            held = [row.id for row in rows]
            connection.execute(
                update(jobs)
                .where(jobs.c.id.in_(held))
                .values(
                    status=IN_PROGRESS,
                    lease=lease,
                    leased_until=now + seconds,
                    attempts=jobs.c.attempts + 1,
                    started_at=func.coalesce(jobs.c.started_at, now),
                )
            )
            query = select(jobs).where(jobs.c.id.in_(held)).order_by(jobs.c.number)
            taken = connection.execute(query).all()
        watched = frozenset(row.id for row in taken if row.watched_until > now)
        return Batch(lease, [_job(row) for row in taken], watched)

    def renew(self, lease: str, seconds: float) -> Held:
        with self.engine.begin() as connection:
            now = self._now(connection)
            mine = (jobs.c.lease == lease, jobs.c.status == IN_PROGRESS)
            connection.execute(update(jobs).where(*mine).values(leased_until=now + seconds))
            rows = connection.execute(select(jobs.c.id, jobs.c.watched_until).where(*mine)).all()
        watched = frozenset(row.id for row in rows if row.watched_until > now)
        return Held(frozenset(row.id for row in rows), watched)

    def report(self, lease: str, progress: int, stage: str) -> None:
        """Tell how far the jobs of a lease are."""
        with self.engine.begin() as connection:
            query = update(jobs).where(jobs.c.lease == lease, jobs.c.status == IN_PROGRESS)
            connection.execute(query.values(progress=progress, stage=stage))

    def advance(self, lease: str, id: str, frames: int) -> bool:
        """A draft of so many frames is stored, and attempts are counted anew; False if the job is no longer
        held."""
        with self.engine.begin() as connection:
            query = update(jobs).where(jobs.c.lease == lease, jobs.c.id == id)
            return bool(connection.execute(query.values(frames=frames, attempts=1)).rowcount)

    def show(self, lease: str, id: str, stage: str, frames: int, image: bytes) -> None:
        """Store a preview, in place of the one before."""
        with self.engine.begin() as connection:
            held = connection.execute(
                select(jobs.c.id).where(jobs.c.lease == lease, jobs.c.id == id).with_for_update()
            ).one_or_none()
            if held is None:
                return
            version = connection.execute(
                select(func.coalesce(func.max(previews.c.version), 0)).where(previews.c.id == id)
            ).scalar_one()
            connection.execute(delete(previews).where(previews.c.id == id))
            values = {"id": id, "version": version + 1, "stage": stage, "frames": frames, "image": image}
            connection.execute(insert(previews).values(**values))

    def finish(self, lease: str, id: str, size: int) -> bool:
        """Complete a job whose results of `size` bytes are stored; False if it is no longer held."""
        with self.engine.begin() as connection:
            now = self._now(connection)
            done = connection.execute(
                update(jobs)
                .where(jobs.c.lease == lease, jobs.c.id == id, jobs.c.status == IN_PROGRESS)
                .values(
                    status=COMPLETED,
                    progress=100,
                    stage="",
                    lease=None,
                    completed_at=now,
                    expires_at=now + self.keep_seconds,
                    bytes=size,
                )
            )
            connection.execute(delete(previews).where(previews.c.id == id))
            return bool(done.rowcount)

    def fail(self, lease: str, id: str, code: str, message: str) -> None:
        with self.engine.begin() as connection:
            now = self._now(connection)
            values = {
                "status": FAILED,
                "lease": None,
                "completed_at": now,
                "expires_at": now + self.keep_seconds,
                "error_code": code,
                "error_message": message,
            }
            connection.execute(update(jobs).where(jobs.c.lease == lease, jobs.c.id == id).values(**values))

    def release(self, lease: str) -> None:
        """Give the jobs of a lease back, as a worker does that stops; this is no attempt."""
        with self.engine.begin() as connection:
            connection.execute(
                update(jobs)
                .where(jobs.c.lease == lease, jobs.c.status == IN_PROGRESS)
                .values(status=QUEUED, lease=None, attempts=jobs.c.attempts - 1)
            )

    def release_lost(self, worker: str) -> None:
        """Queue the jobs of a worker again that is known to be dead, before its leases end."""
        with self.engine.begin() as connection:
            connection.execute(
                update(jobs)
                .where(jobs.c.lease.startswith(worker), jobs.c.status == IN_PROGRESS)
                .values(leased_until=0.0)
            )
            self._requeue(connection, self._now(connection))

    def sweep(self, quota: int | None = None) -> list[str]:
        """Forget what has expired, then the oldest results above a quota of bytes; return their names.

        Jobs whose leases have ended are queued again. Unfinished jobs are never forgotten.
        """
        with self.engine.begin() as connection:
            now = self._now(connection)
            self._requeue(connection, now)
            gone = set(connection.scalars(select(jobs.c.id).where(jobs.c.expires_at < now)))
            if quota is not None:
                gone |= self._above(connection, quota, gone)
            connection.execute(delete(jobs).where(jobs.c.id.in_(gone)))
            connection.execute(delete(previews).where(previews.c.id.in_(gone)))
        return sorted(gone)

    def unknown(self, ids: Sequence[str]) -> list[str]:
        """Those of the names that no job has."""
        known = set(self._read(select(jobs.c.id).where(jobs.c.id.in_(ids))).scalars())
        return [id for id in ids if id not in known]

    # -- helpers --

    def _above(self, connection: Connection, quota: int, gone: set[str]) -> set[str]:
        """The oldest completed jobs, until the others fit into a quota of bytes."""
        done = select(jobs.c.id, jobs.c.bytes).where(jobs.c.status == COMPLETED, jobs.c.id.not_in(gone))
        rows = connection.execute(done.order_by(jobs.c.completed_at)).all()
        total = sum(row.bytes for row in rows)
        above = set()
        for row in rows:
            if total <= quota:
                break
            above.add(row.id)
            total -= row.bytes
        return above

    def _requeue(self, connection: Connection, now: float) -> None:
        """Queue jobs whose lease has ended again, or fail those that ended too many workers."""
        lost = (jobs.c.status == IN_PROGRESS, jobs.c.leased_until < now)
        connection.execute(
            update(jobs)
            .where(*lost, jobs.c.attempts >= MAX_ATTEMPTS)
            .values(
                status=FAILED,
                lease=None,
                completed_at=now,
                expires_at=now + self.keep_seconds,
                error_code="worker_lost",
                error_message=f"{MAX_ATTEMPTS} workers ended while they generated it",
            )
        )
        connection.execute(update(jobs).where(*lost).values(status=QUEUED, lease=None))

    def _retry_after(self, connection: Connection) -> int:
        """Seconds until a place should be free: as long as recent jobs took, in the mean."""
        recent = (
            select(jobs.c.started_at, jobs.c.completed_at)
            .where(jobs.c.status == COMPLETED)
            .order_by(jobs.c.completed_at.desc())
            .limit(20)
        )
        taken = [row.completed_at - row.started_at for row in connection.execute(recent)]
        return max(1, round(sum(taken) / len(taken))) if taken else 10

    def _count(self, connection: Connection, condition: Any) -> int:
        query = select(func.count()).select_from(jobs).where(condition)
        count: int = connection.execute(query).scalar_one()
        return count

    def _read(self, query: Select[Any]) -> Any:
        with self.engine.connect().execution_options(reads=True) as connection:
            return connection.execute(query).freeze()()

    def _now(self, connection: Connection) -> float:
        if self._postgres:
            return float(
                connection.execute(text("select extract(epoch from clock_timestamp())")).scalar_one()
            )
        return time.time()


def _groups(connection: Connection, models: Container[str]) -> list[str]:
    """The groups of waiting jobs that are of these models."""
    waiting = connection.scalars(select(jobs.c.group).where(jobs.c.status == QUEUED).distinct())
    return [group for group in waiting if VideoRequest.model_of(group) in models]


def _job(row: Row[Any]) -> Job:
    same = {name: getattr(row, name) for name in Job.__dataclass_fields__ if name != "request"}
    return Job(**same, request=VideoRequest(**row.request))


def open_engine(url: str) -> Engine:
    """An engine whose transactions are serial: SQLite with a write-ahead log, synced; or PostgreSQL."""
    if url.startswith("postgresql://"):
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    try:
        engine = create_engine(url, pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise ValueError(
            f"--database {url!r} cannot be used: {error}; give sqlite:///FILE or postgresql://USER@HOST/NAME"
        ) from None
    if engine.dialect.name != "sqlite":
        return engine

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy begins, not the driver
        connection.execute("pragma busy_timeout = 30000")
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = full")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get("reads")
        connection.exec_driver_sql("begin" if reads else "begin immediate")

    return engine
