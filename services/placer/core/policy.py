"""Every number by which the placer decides, with its unit and the reason for its default."""

from __future__ import annotations

import msgspec


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Times are in seconds, demand in device-seconds per second (1.0 keeps one device busy)."""

    work_per_tick: int = 600
    """So much is decided in one planning, the most urgent first; what is left over is due at the
    next. The unit is about 0.1 ms in a fleet of 1,000 workers (`Planner.spent`): however much
    changes at once, the fleet gets its first decisions after one tick and not after minutes."""
    put_off_s: float = 1.0
    """Who has waited so long for its turn goes first, whatever its priority: those that find no
    place are looked at each time, and must not stand before it for ever."""
    target_utilization: float = 0.7
    """A copy is meant to be this busy; the rest is room for bursts."""
    release_utilization: float = 0.6
    """A copy is surplus when the others would stay below this: less than the target, so that
    what was just added is not surplus at once."""
    hold_down_s: float = 10.0
    """A copy is surplus for this long before it is unbound."""
    hold_down_loads: float = 20.0
    """... and for at least this many times what loading it cost."""
    step_up_min: int = 2
    """This many copies of one model may be on their way at once, in a fleet of any size."""
    step_up_share: float = 1 / 3
    """... or this share of the workers: fast for a spike, without turning the whole fleet."""
    deactivate_after_s: float = 600.0
    """A model that nobody asked for this long is unbound and its queue deleted."""
    victim_idle_s: float = 1.0
    """A model may make room for another when nobody asked it for this long: short, since a
    request that waits counts more than one that may come."""
    victim_min_age_s: float = 2.0
    """... and its binding is older than this, so that newcomers do not evict each other."""
    victim_min_age_loads: float = 10.0
    """... and older than this many times what loading it cost: churn cannot eat the fleet."""
    fast_tau_s: float = 1.0
    """Time constant of the fast arrival rate: sees a spike."""
    slow_tau_s: float = 60.0
    """Time constant of the slow arrival rate: remembers the model's usual traffic."""
    shortest_horizon_s: float = 0.2
    """A backlog is meant to be worked off in half the model's latency target, but never
    faster than this: one tick."""
    unknown_load_s: float = 1.0
    """Load time of a model that nobody has loaded yet, where nothing else was loaded either."""
    host_load_share: float = 0.3
    """What loading from host memory takes, of loading from disk, until a worker has measured it."""
    load_weight: float = 1.0
    """One second of loading weighs as much as this much utilization of a device."""
    memory_weight: float = 0.1
    """A full worker weighs this much more than an empty one: spreads what is otherwise equal."""
    load_share: float = 0.3
    """A worker spends at most this share of its time on loading copies that nobody waits for
    without them: further copies, spare ones, moves. A model without a binding never waits."""
    load_window_s: float = 10.0
    """... over about this long."""
    spare_above: float = 0.1
    """A model whose copies are each asked for this much, on the slow average, gets a spare copy
    where memory is free and nobody waits. It keeps it above half of that."""
    spare_reserve: float = 0.1
    """Spare copies leave this share of a device free, so that who comes finds room at once."""
    spare_below: float = 0.6
    """No spare copy on a worker that is asked for more than this: consumers of one queue split
    its batches, and a batch costs the same whatever is in it."""
    spare_every_s: float = 1.0
    """Spare copies are added this often ..."""
    spare_at_once: int = 16
    """... and so many."""
    uneven_above: float = 0.25
    """Bindings move when a worker, itself above the target, is asked for so much more than the
    coolest one: what one bursty model's average wavers by is no reason."""
    neighbours_stay_s: float = 4.5
    """Where a model surges, the others stay on its worker for this long: in a spike its further
    copies relieve the worker within a second. Where they do not, the traffic has changed."""
    move_every_s: float = 0.25
    """It is looked for such workers this often: a moving average says the same for longer."""
    moves_at_once: int = 8
    """So many bindings are on their way at once: more would all aim at who is cool just now."""
    move_tries: int = 8
    """So many bindings of one worker are looked at for a place elsewhere."""
    move_least: float = 0.05
    """What asks for less is not worth a move ..."""
    move_gain: float = 0.1
    """... and the target is to stay cooler than the source was by so much."""
    move_rest_s: float = 5.0
    """A model that was moved is not moved again, nor given a spare copy, for this long: five
    times what the fast average looks back."""
    move_timeout_s: float = 60.0
    """A move whose target has not bound by then is given up."""
    retry_failed_s: float = 10.0
    """A worker that failed to load a model is not asked again for this long."""
    engine_grace_s: float = 5.0
    """A worker whose engine is down keeps its bindings for this long: engines restart. What is
    asked meanwhile and is loaded elsewhere sooner gets another copy at once."""
    silent_after_s: float = 1.2
    """So does what a worker has of which nothing was heard for this long, four of its reports and
    a tick: too short to take anything from it, which its report's end does (3 s)."""
    silent_share: float = 0.5
    """... unless more of the fleet than this is silent: then it is the store, or ourselves."""
    quota_wait_s: float = 5.0
    """Requests for a model whose tenant may have no more copies wait so long for one of the
    tenant's own to make room; then they are answered with the reason. Longer than models that have
    just come are kept (`victim_min_age_s`)."""
    grow_above: float = 0.85
    """More workers are wanted when demand exceeds this share of the fleet."""
    grow_after_s: float = 0.6
    """... for this long: three ticks."""
    shrink_below: float = 0.5
    """Fewer workers are wanted when demand is below this share of one worker fewer."""
    shrink_after_s: float = 120.0
    """... for this long."""
    min_workers: int = 1
    """Never fewer are wanted. With 0 the fleet may go to sleep."""
    scale_to_zero_after_s: float = 600.0
    """... when no model was asked for this long and none is to have copies at all times."""
