//! The queues against a plain vector, and what they promise beyond order.

use proptest::prelude::*;

use super::*;
use crate::api::UseStats;

#[derive(Clone, Debug)]
struct Entry {
    links: Links,
    facts: Facts,
}

#[derive(Clone, Debug, Default)]
struct Entries(Vec<Entry>);

impl Look for Entries {
    fn links(&self, index: u32) -> Links {
        self.0[index as usize].links
    }

    fn facts(&self, index: u32) -> Facts {
        self.0[index as usize].facts
    }
}

impl Slab for Entries {
    fn links_mut(&mut self, index: u32) -> &mut Links {
        &mut self.0[index as usize].links
    }
}

fn class(number: u8) -> Class {
    Class::of(UseStats { depth: 0, turn: number % 4, uses: number / 4 })
}

fn slab(blocks: u32) -> Entries {
    let facts = |n: u32| Facts { class: class((n % 16) as u8), used: Tick::default(), worth: 1.0 };
    Entries((0..blocks).map(|n| Entry { links: Links::default(), facts: facts(n) }).collect())
}

/// Ranks that fall with age within a class and differ between classes.
fn learned() -> Hazards {
    let mut hazards = Hazards::new();
    for n in 0..40_000u32 {
        let number = (n % 16) as u8;
        let age = u32::from(number) * 40 + n % 7;
        let last = crate::policy::hazards::bucket(age);
        (0..=last).for_each(|bucket| hazards.reached(class(number), bucket));
        if n % (u32::from(number) + 2) == 0 {
            hazards.used(class(number), last);
        } else {
            hazards.lost(class(number), last);
        }
    }
    assert!(hazards.learned() > 0, "it has seen enough");
    hazards
}

#[derive(Clone, Debug)]
enum Act {
    /// Uses a block now and lists it.
    Use(u32),
    /// Takes it out.
    Unlist(u32),
    /// Takes it out and lists it again without a use.
    Relist(u32),
    /// Time passes.
    Wait,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        5 => (0..40u32).prop_map(Act::Use),
        1 => (0..40u32).prop_map(Act::Unlist),
        2 => (0..40u32).prop_map(Act::Relist),
        3 => Just(Act::Wait),
    ]
}

proptest! {
    /// Links could be lost, or a choice remembered that no longer holds: after every act the
    /// choices are those of a scan over all listed blocks.
    #[test]
    fn choices_are_those_of_a_scan(acts in proptest::collection::vec(act(), 1..300), by_age in any::<bool>()) {
        let hazards = learned();
        let (mut slab, mut queues, mut now) = (slab(40), Queues::default(), Tick::default());
        for act in acts {
            match act {
                Act::Use(index) => {
                    queues.unlist(&mut slab, index);
                    slab.0[index as usize].facts.used = now;
                    queues.list(&mut slab, index, Place::Ordinary, now);
                }
                Act::Unlist(index) => queues.unlist(&mut slab, index),
                Act::Relist(index) => {
                    queues.unlist(&mut slab, index);
                    queues.list(&mut slab, index, Place::Ordinary, now);
                }
                Act::Wait => now = now.next(),
            }
            let listed: Vec<u32> = (0..40).filter(|&index| slab.links(index).is_listed()).collect();
            let age = |index: u32| now.since(slab.facts(index).used);
            if by_age {
                let oldest = listed.iter().map(|&index| age(index)).max();
                prop_assert_eq!(queues.coldest(&slab, now, |_| false).map(age), oldest);
                continue;
            }
            // Of each class the oldest and the newest are looked at.
            let rank = |index: u32| hazards.rank(slab.facts(index).class, age(index), 1.0);
            let least = listed.iter().copied().filter(|&index| {
                let mut alike = listed.iter().filter(|&&other| slab.facts(other).class == slab.facts(index).class);
                let ages = || listed.iter().filter(|&&other| slab.facts(other).class == slab.facts(index).class).map(|&other| age(other));
                alike.next().is_some() && (Some(age(index)) == ages().max() || Some(age(index)) == ages().min())
            }).map(rank).min_by(f32::total_cmp);
            prop_assert_eq!(queues.least(&slab, &hazards, now, |_| false).map(rank), least);
        }
    }
}

/// Taking the coldest out again and again must give every block once, oldest first.
#[test]
fn blocks_leave_in_order_of_last_use() {
    let (mut slab, mut queues, mut now) = (slab(200), Queues::default(), Tick::default());
    for index in (0..200).rev() {
        now = now.next();
        slab.0[index as usize].facts.used = now;
        queues.list(&mut slab, index, Place::Ordinary, now);
    }
    for wanted in (0..200).rev() {
        assert_eq!(queues.coldest(&slab, now, |_| false), Some(wanted));
        queues.unlist(&mut slab, wanted);
    }
    assert_eq!(queues.coldest(&slab, now, |_| false), None);
}

/// An orphan takes room for nothing, and a promise is kept while anything else can go.
#[test]
fn orphans_go_first_and_retained_blocks_last() {
    let (mut slab, mut queues, now) = (slab(3), Queues::default(), Tick::default());
    queues.list(&mut slab, 0, Place::Retained, now);
    queues.list(&mut slab, 1, Place::Ordinary, now);
    queues.list(&mut slab, 2, Place::Orphan, now);
    let hazards = learned();
    for wanted in [2, 1, 0] {
        assert_eq!(queues.coldest(&slab, now, |_| false), Some(wanted));
        assert_eq!(queues.least(&slab, &hazards, now, |_| false), Some(wanted));
        queues.unlist(&mut slab, wanted);
    }
}

/// A busy block must not be chosen, nor hide those behind it, nor cost a walk over all.
#[test]
fn busy_blocks_are_passed_over_within_a_bound() {
    let (mut slab, mut queues, mut now) = (slab(64), Queues::default(), Tick::default());
    for index in 0..64 {
        now = now.next();
        slab.0[index as usize].facts = Facts { class: class(0), used: now, worth: 1.0 };
        queues.list(&mut slab, index, Place::Ordinary, now);
    }
    assert_eq!(queues.coldest(&slab, now, |index| index < 3), Some(3));
    assert_eq!(queues.coldest(&slab, now, |_| false), Some(3), "found again at the next tick");
    assert_eq!(queues.coldest(&slab, now.next(), |_| false), Some(0));
    let looks = std::cell::Cell::new(0);
    let found = queues.coldest(&slab, now.next(), |_| {
        looks.set(looks.get() + 1);
        true
    });
    assert_eq!(found, None);
    assert!(looks.get() <= 4 * (SKIPS_MAX + 2), "{} looks", looks.get());
}

/// A parent becomes a leaf long after its use: it belongs between those used before and after it,
/// and where that is far from both ends, the walk must end all the same.
#[test]
fn a_block_listed_late_gets_its_place() {
    for late in [3, 60, 117] {
        let (mut slab, mut queues, mut now) = (slab(120), Queues::default(), Tick::default());
        for index in 0..120 {
            now = now.next();
            slab.0[index as usize].facts = Facts { class: class(0), used: now, worth: 1.0 };
            if index != late {
                queues.list(&mut slab, index, Place::Ordinary, now);
            }
        }
        queues.list(&mut slab, late, Place::Ordinary, now);
        let mut order = Vec::new();
        while let Some(index) = queues.coldest(&slab, now, |_| false) {
            queues.unlist(&mut slab, index);
            order.push(index);
        }
        let at = order.iter().position(|&index| index == late).expect("it is listed");
        let off = at.abs_diff(late as usize);
        assert!(off == 0 || (late == 60 && off <= 60 - PLACE_STEPS as usize), "{late} is at {at}");
    }
}

/// One class with the highest worth and one with the lowest: worth per byte decides between equals.
#[test]
fn worth_counts() {
    let hazards = learned();
    let (mut slab, mut queues, now) = (slab(2), Queues::default(), Tick::default());
    slab.0[0].facts = Facts { class: class(4), used: now, worth: 2.0 };
    slab.0[1].facts = Facts { class: class(4), used: now, worth: 1.0 };
    queues.list(&mut slab, 0, Place::Ordinary, now);
    queues.list(&mut slab, 1, Place::Ordinary, now);
    assert_eq!(queues.least(&slab, &hazards, now, |_| false), Some(1));
}
