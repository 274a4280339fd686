//! Requests that wait for a device, by class: who goes next.
//!
//! Classes share the device by weight, in bytes: one that alone wants it has it
//! all, and none starves. A request that waited past its class's deadline goes
//! out of turn, but only one pick in four, so that a long backlog of the least
//! urgent does not hold up the most urgent. Pure: time is an argument.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use terrace_core::{IoClass, OpId};

const CLASSES: usize = IoClass::ALL.len();
/// One pick of this many may go to a request that is past its deadline.
const LATE_TURN: u32 = 4;
/// Virtual time of a byte at weight 1. The heaviest weight divides it.
const SCALE: u64 = 64;

/// Share of the device, and how long a request may wait before it is late.
const fn terms(class: IoClass) -> (u64, Duration) {
    match class {
        IoClass::DecodeFetch => (32, Duration::from_millis(20)),
        IoClass::PrefillFetch => (16, Duration::from_millis(100)),
        IoClass::Demotion => (8, Duration::from_millis(250)),
        IoClass::Prefetch => (4, Duration::from_millis(500)),
        IoClass::Persistence => (2, Duration::from_secs(1)),
        IoClass::Scrub => (1, Duration::from_secs(5)),
    }
}

const fn rank(class: IoClass) -> usize {
    match class {
        IoClass::DecodeFetch => 0,
        IoClass::PrefillFetch => 1,
        IoClass::Demotion => 2,
        IoClass::Prefetch => 3,
        IoClass::Persistence => 4,
        IoClass::Scrub => 5,
    }
}

/// Nobody waits for these: they may not fill the device.
pub(super) const fn is_background(class: IoClass) -> bool {
    match class {
        IoClass::DecodeFetch | IoClass::PrefillFetch | IoClass::Demotion => false,
        IoClass::Prefetch | IoClass::Persistence | IoClass::Scrub => true,
    }
}

/// What the device may get now, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) bytes: u64,
    /// The same for a background class.
    pub(super) background: u64,
    /// Longest run of requests that are picked together.
    pub(super) run: u64,
    /// The device has enough to do: a run may wait for room for all of it.
    pub(super) may_wait: bool,
}

struct Entry<T> {
    item: T,
    bytes: u64,
    tag: Option<OpId>,
    due: Instant,
}

struct Lane<T> {
    entries: VecDeque<Entry<T>>,
    /// Virtual time at which its next request may go.
    pass: u64,
}

/// The queues of one device.
pub(super) struct ClassQueues<T> {
    lanes: [Lane<T>; CLASSES],
    /// Virtual time of the last pick: where a class that comes back starts.
    clock: u64,
    picks: u32,
    waiting: usize,
}

impl<T> ClassQueues<T> {
    pub(super) fn new() -> Self {
        let lanes = std::array::from_fn(|_| Lane { entries: VecDeque::new(), pass: 0 });
        Self { lanes, clock: 0, picks: 0, waiting: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.waiting
    }

    /// Requests that wait, by class.
    pub(super) fn lengths(&self) -> [u64; CLASSES] {
        std::array::from_fn(|place| self.lanes[place].entries.len() as u64)
    }

    pub(super) fn push(&mut self, class: IoClass, bytes: u64, tag: Option<OpId>, now: Instant, item: T) {
        let due = now + terms(class).1;
        let lane = &mut self.lanes[rank(class)];
        if lane.entries.is_empty() {
            // What it did not use while it wanted nothing is not owed to it.
            lane.pass = lane.pass.max(self.clock);
        }
        lane.entries.push_back(Entry { item, bytes, tag, due });
        self.waiting += 1;
    }

    /// The next request, if there is room for it, and those behind it that `joins` the one before: a run, which one
    /// I/O can move. Appended to `run`; `None` is nothing.
    pub(super) fn pick(
        &mut self,
        now: Instant,
        room: Room,
        joins: impl Fn(&T, &T) -> bool,
        run: &mut Vec<T>,
    ) -> Option<IoClass> {
        let place = self.choose(now, room.background)?;
        let class = IoClass::ALL[place];
        let lane = &mut self.lanes[place];
        let mut ends = lane.entries.front()?.bytes;
        if ends > room.bytes {
            return None;
        }
        let free = if is_background(class) { room.bytes.min(room.background) } else { room.bytes };
        let mut count = 1;
        for (entry, next) in lane.entries.iter().zip(lane.entries.range(1..)) {
            if ends + next.bytes > room.run || !joins(&entry.item, &next.item) {
                break;
            }
            if ends + next.bytes > free {
                // Not for the share of background classes: others would wait with it, although there is room for them.
                if room.may_wait && free == room.bytes {
                    return None;
                }
                break;
            }
            (ends, count) = (ends + next.bytes, count + 1);
        }
        self.clock = self.clock.max(lane.pass);
        lane.pass = lane.pass.max(self.clock) + ends.max(1) * (SCALE / terms(class).0);
        self.picks = self.picks.wrapping_add(1);
        self.waiting -= count;
        run.extend(lane.entries.drain(..count).map(|entry| entry.item));
        Some(class)
    }

    fn choose(&self, now: Instant, background: u64) -> Option<usize> {
        let may_go = |place: &usize| {
            let front = self.lanes[*place].entries.front();
            front.is_some_and(|entry| !is_background(IoClass::ALL[*place]) || entry.bytes <= background)
        };
        let due = |place: &usize| self.lanes[*place].entries.front().map(|entry| entry.due);
        if self.picks % LATE_TURN == LATE_TURN - 1 {
            let late = |place: &usize| due(place).is_some_and(|due| due < now);
            let found = (0..CLASSES).filter(may_go).filter(late).min_by_key(due);
            if found.is_some() {
                return found;
            }
        }
        // The first of equals is the most urgent.
        (0..CLASSES).filter(may_go).min_by_key(|place| self.lanes[*place].pass)
    }

    /// Moves a request that waits to a more urgent class. False if it does not wait.
    pub(super) fn promote(&mut self, tag: OpId, class: IoClass, now: Instant) -> bool {
        let Some((place, at)) = self.find(tag) else { return false };
        if rank(class) < place
            && let Some(entry) = self.lanes[place].entries.remove(at)
        {
            self.waiting -= 1;
            self.push(class, entry.bytes, entry.tag, now, entry.item);
        }
        true
    }

    /// Takes a request out that waits.
    pub(super) fn cancel(&mut self, tag: OpId) -> Option<T> {
        let (place, at) = self.find(tag)?;
        let entry = self.lanes[place].entries.remove(at)?;
        self.waiting -= 1;
        Some(entry.item)
    }

    /// Takes all out.
    pub(super) fn drain(&mut self) -> Vec<T> {
        self.waiting = 0;
        self.lanes.iter_mut().flat_map(|lane| lane.entries.drain(..)).map(|entry| entry.item).collect()
    }

    /// The core bounds how many reads wait, so a walk is short.
    fn find(&self, tag: OpId) -> Option<(usize, usize)> {
        let at = |lane: &Lane<T>| lane.entries.iter().position(|entry| entry.tag == Some(tag));
        self.lanes.iter().enumerate().find_map(|(place, lane)| at(lane).map(|at| (place, at)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;

    /// The next request by itself.
    fn pick<T>(
        queues: &mut ClassQueues<T>,
        now: Instant,
        bytes: u64,
        background: u64,
    ) -> Option<(IoClass, T)> {
        let mut run = Vec::new();
        let room = Room { bytes, background, run: 0, may_wait: false };
        let class = queues.pick(now, room, |_, _| true, &mut run)?;
        assert_eq!(run.len(), 1, "no run was asked for");
        Some((class, run.remove(0)))
    }

    fn filled(of_each: u32) -> (ClassQueues<IoClass>, Instant) {
        let (mut queues, now) = (ClassQueues::new(), Instant::now());
        for class in IoClass::ALL {
            (0..of_each).for_each(|_| queues.push(class, 4096, None, now, class));
        }
        (queues, now)
    }

    /// Shares could be turned round, or a class starve: of a long backlog of
    /// all, each must get its weight.
    #[test]
    fn classes_share_by_weight() {
        let (mut queues, now) = filled(1000);
        let mut counts = [0u64; CLASSES];
        for _ in 0..63 * 8 {
            let (class, _) = pick(&mut queues, now, ALL, ALL).unwrap();
            counts[rank(class)] += 1;
        }
        for class in IoClass::ALL {
            let (count, share) = (counts[rank(class)], terms(class).0 * 8);
            assert!(count.abs_diff(share) <= 8, "{class:?} had {count} of its {share}: {counts:?}");
        }
    }

    /// A decode must not wait behind write-behind that was there before, however long that ran alone.
    #[test]
    fn an_urgent_one_goes_next() {
        let (mut queues, now) = (ClassQueues::new(), Instant::now());
        (0..100).for_each(|number| queues.push(IoClass::Persistence, 1 << 20, None, now, number));
        for expected in 0..50 {
            assert_eq!(pick(&mut queues, now, ALL, ALL), Some((IoClass::Persistence, expected)));
        }
        queues.push(IoClass::DecodeFetch, 1 << 20, None, now, 1000);
        assert_eq!(pick(&mut queues, now, ALL, ALL), Some((IoClass::DecodeFetch, 1000)));
        assert_eq!(queues.len(), 50);
    }

    /// A class whose share is small must not wait for ever behind a flood, and a
    /// backlog of late ones must not push the flood aside.
    #[test]
    fn late_ones_have_one_turn_in_four() {
        let (mut queues, now) = (ClassQueues::new(), Instant::now());
        for _ in 0..100 {
            queues.push(IoClass::Scrub, 4096, None, now, ());
        }
        let later = now + Duration::from_secs(6);
        for _ in 0..100 {
            queues.push(IoClass::DecodeFetch, 4096, None, later, ());
        }
        let classes: Vec<_> = (0..40).map(|_| pick(&mut queues, later, ALL, ALL).unwrap().0).collect();
        let scrubs = classes.iter().filter(|class| **class == IoClass::Scrub).count();
        assert!((10..=12).contains(&scrubs), "{classes:?}");
    }

    /// Requests nobody waits for must leave room on the device, and large ones must not be passed for ever.
    #[test]
    fn room_is_kept() {
        let (mut queues, now) = (ClassQueues::new(), Instant::now());
        queues.push(IoClass::Scrub, 8192, None, now, 1);
        assert_eq!(pick(&mut queues, now, ALL, 4096), None, "no room for a background one");
        queues.push(IoClass::Demotion, 65_536, None, now, 2);
        queues.push(IoClass::Demotion, 4096, None, now, 3);
        assert_eq!(
            pick(&mut queues, now, 4096, 4096),
            None,
            "a small one does not pass the large one before it"
        );
        assert_eq!(pick(&mut queues, now, 65_536, 0), Some((IoClass::Demotion, 2)));
    }

    /// What is promoted goes as its new class; what is cancelled does not go; what runs is neither.
    #[test]
    fn promotion_and_cancellation() {
        let (mut queues, now) = (ClassQueues::new(), Instant::now());
        let tag = |number| Some(OpId::new(number));
        for number in 1..=3 {
            queues.push(IoClass::Prefetch, 4096, tag(number), now, number);
        }
        assert!(queues.promote(OpId::new(3), IoClass::DecodeFetch, now));
        assert_eq!(pick(&mut queues, now, ALL, ALL), Some((IoClass::DecodeFetch, 3)));
        assert!(!queues.promote(OpId::new(3), IoClass::DecodeFetch, now), "it runs");
        assert!(queues.promote(OpId::new(2), IoClass::Scrub, now), "never less urgent");
        assert_eq!(queues.cancel(OpId::new(1)), Some(1));
        assert_eq!(queues.cancel(OpId::new(1)), None);
        assert_eq!(queues.lengths(), [0, 0, 0, 1, 0, 0]);
        assert_eq!(queues.drain(), vec![2]);
        assert_eq!(queues.len(), 0);
    }

    /// A run must not pass a gap, the longest run, the room, or another class; and while the device has enough to do it
    /// waits for room for all of it, or reading a prompt would go on one by one as it began.
    #[test]
    fn neighbours_go_together() {
        let (mut queues, now) = (ClassQueues::new(), Instant::now());
        for number in [1, 2, 3, 4, 6, 7, 20, 21] {
            queues.push(IoClass::PrefillFetch, 10, None, now, number);
        }
        let mut next = |bytes, run, may_wait| {
            let mut items = Vec::new();
            let room = Room { bytes, background: ALL, run, may_wait };
            queues.pick(now, room, |one, two| one + 1 == *two, &mut items).map(|_| items)
        };
        assert_eq!(next(9, 40, false), None, "no room for one");
        assert_eq!(next(20, 40, true), None, "it waits for room for four");
        assert_eq!(next(20, 30, false), Some(vec![1, 2]), "as many as there is room for");
        assert_eq!(next(ALL, ALL, true), Some(vec![3, 4]), "6 is no neighbour");
        assert_eq!(next(ALL, 10, true), Some(vec![6]), "no longer than allowed");
        assert_eq!((next(ALL, ALL, true), next(ALL, ALL, true)), (Some(vec![7]), Some(vec![20, 21])));
        assert_eq!((next(ALL, ALL, true), queues.len()), (None, 0));
        // Whichever class has its turn, the other does not come with it.
        queues.push(IoClass::PrefillFetch, 10, None, now, 1);
        queues.push(IoClass::Prefetch, 10, None, now, 2);
        let room = Room { bytes: ALL, background: ALL, run: ALL, may_wait: true };
        let mut items = Vec::new();
        queues.pick(now, room, |_, _| true, &mut items);
        assert_eq!((items.len(), queues.len()), (1, 1));
    }

    /// A run of background requests that is longer than their share must not hold up whoever waits behind it: it goes
    /// as far as the share goes.
    #[test]
    fn a_background_run_keeps_to_its_share() {
        let (mut queues, now) = (ClassQueues::new(), Instant::now());
        (0..3).for_each(|number| queues.push(IoClass::Prefetch, 10, None, now, number));
        let room = Room { bytes: 100, background: 20, run: ALL, may_wait: true };
        let mut items = Vec::new();
        assert_eq!(queues.pick(now, room, |_, _| true, &mut items), Some(IoClass::Prefetch));
        assert_eq!(items, [0, 1]);
    }
}
