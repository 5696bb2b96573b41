"""Draw what is lacking of some sides, batch by batch, and keep each batch as it comes."""

from surgery.errors import InputError
from surgery.generating import number_of_steps
from surgery.progress import progress_bar

from .store import ImageStore
from .workers import crew


def draw_sides(folder, sides, jobs, order, *, batch=None, workers=1, address=None, announce=None):
    """({Side name: {Job key: PNG path}}, batch sizes) of every Job and Side, drawing those that `folder` does not hold.

    Batches are cut from the Jobs that are lacking, in their order. A finished batch is kept whole, so a killed run goes
    on with the very batches that it would have drawn, and the images do not depend on the number of workers.
    batch: images drawn at once; unless given, what was used here before, else chosen by memory. The second value are
    the sizes behind the images, which may differ in their last bits by them. announce: called with (there, to draw,
    batch).
    Raises InputError for a batch or workers under 1, and what painter, workers and store raise.
    """
    if batch is not None and batch < 1:
        raise InputError(f"--batch must be at least 1, not {batch}")
    stores = {side.key: ImageStore(folder, side) for side in sides}
    lacking = {key: _lacking(jobs, store.existing()) for key, store in stores.items()}
    total = sum(map(len, lacking.values()))
    if total:
        with crew(order, workers, address) as painters:
            batch = batch or _used_before(stores.values()) or painters.batch_size()
            if announce:
                announce(len(stores) * len({job.key for job in jobs}) - total, total, batch)
            with progress_bar("drawing", total * number_of_steps(order.sampling), "image steps") as advance:
                for (side, some), images in painters.draw(_tasks(stores, lacking, batch), advance):
                    stores[side.key].add(some, images, batch)
    found = {}
    for side in sides:
        there = stores[side.key].existing()
        found[side.name] = {job.key: there[job.key] for job in jobs}
    return found, sorted(set().union(*(store.batch_sizes() for store in stores.values())))


def _used_before(stores):
    return max((size for store in stores for size in store.batch_sizes()), default=None)


def _lacking(jobs, existing):
    return list({job.key: job for job in jobs if job.key not in existing}.values())


def _tasks(stores, lacking, batch):
    """[(Side, Jobs)], the sides in turn, so that a run that is cut short has pairs to show."""
    cut = [
        [(store.side, lacking[key][at : at + batch]) for at in range(0, len(lacking[key]), batch)]
        for key, store in stores.items()
    ]
    return [tasks[at] for at in range(max(map(len, cut))) for tasks in cut if at < len(tasks)]
