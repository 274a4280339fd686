//! What a simulation has seen happen.

use terrace_core::Counters;

/// Which rare things happened, so that the simulation cannot become blind unnoticed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) reads: u64,
    pub(crate) moved: u64,
    pub(crate) durable: u64,
    pub(crate) restarts: u64,
    pub(crate) power_cuts: u64,
    pub(crate) rebuilt: u64,
    pub(crate) conflicts: u64,
    pub(crate) rejected: u64,
    pub(crate) promotions: u64,
    pub(crate) evictions_nvme: u64,
    pub(crate) retired: u64,
    pub(crate) replaced: u64,
    pub(crate) adopted: u64,
    pub(crate) ahead: u64,
    pub(crate) kept: u64,
    pub(crate) intakes: u64,
    pub(crate) copies: u64,
    pub(crate) expired: u64,
    pub(crate) revoked: u64,
    pub(crate) clears: u64,
    pub(crate) throttled: u64,
    pub(crate) repeats: u64,
    pub(crate) ended_repeats: u64,
    pub(crate) promoted: u64,
    pub(crate) cancelled: u64,
    pub(crate) lies: u64,
    pub(crate) lies_read: u64,
    pub(crate) scrubbed: u64,
    pub(crate) scrub_damaged: u64,
    pub(crate) promotions_hbm: u64,
    pub(crate) demotions_hbm: u64,
    pub(crate) evictions_hbm: u64,
    pub(crate) hbm_adopted: u64,
    pub(crate) hbm_reads: u64,
    pub(crate) hbm_direct: u64,
    pub(crate) hbm_peers: u64,
    pub(crate) hbm_lost: u64,
    pub(crate) hbm_doomed: u64,
    pub(crate) shrunk: u64,
}

impl Seen {
    fn fields(&self) -> [u64; 39] {
        [
            self.reads,
            self.moved,
            self.durable,
            self.restarts,
            self.power_cuts,
            self.rebuilt,
            self.conflicts,
            self.rejected,
            self.promotions,
            self.evictions_nvme,
            self.retired,
            self.replaced,
            self.adopted,
            self.ahead,
            self.kept,
            self.intakes,
            self.copies,
            self.expired,
            self.revoked,
            self.clears,
            self.throttled,
            self.repeats,
            self.ended_repeats,
            self.promoted,
            self.cancelled,
            self.lies,
            self.lies_read,
            self.scrubbed,
            self.scrub_damaged,
            self.promotions_hbm,
            self.demotions_hbm,
            self.evictions_hbm,
            self.hbm_adopted,
            self.hbm_reads,
            self.hbm_direct,
            self.hbm_peers,
            self.hbm_lost,
            self.hbm_doomed,
            self.shrunk,
        ]
    }

    pub(crate) fn add(&mut self, other: &Seen) {
        self.reads += other.reads;
        self.moved += other.moved;
        self.durable += other.durable;
        self.restarts += other.restarts;
        self.power_cuts += other.power_cuts;
        self.rebuilt += other.rebuilt;
        self.conflicts += other.conflicts;
        self.rejected += other.rejected;
        self.promotions += other.promotions;
        self.evictions_nvme += other.evictions_nvme;
        self.retired += other.retired;
        self.replaced += other.replaced;
        self.adopted += other.adopted;
        self.ahead += other.ahead;
        self.kept += other.kept;
        self.intakes += other.intakes;
        self.copies += other.copies;
        self.expired += other.expired;
        self.revoked += other.revoked;
        self.clears += other.clears;
        self.throttled += other.throttled;
        self.repeats += other.repeats;
        self.ended_repeats += other.ended_repeats;
        self.promoted += other.promoted;
        self.cancelled += other.cancelled;
        self.lies += other.lies;
        self.lies_read += other.lies_read;
        self.scrubbed += other.scrubbed;
        self.scrub_damaged += other.scrub_damaged;
        self.promotions_hbm += other.promotions_hbm;
        self.demotions_hbm += other.demotions_hbm;
        self.evictions_hbm += other.evictions_hbm;
        self.hbm_adopted += other.hbm_adopted;
        self.hbm_reads += other.hbm_reads;
        self.hbm_direct += other.hbm_direct;
        self.hbm_peers += other.hbm_peers;
        self.hbm_lost += other.hbm_lost;
        self.hbm_doomed += other.hbm_doomed;
        self.shrunk += other.shrunk;
    }

    pub(crate) fn assert_all(&self) {
        assert!(self.fields().iter().all(|&times| times > 0), "something never happened: {self:?}");
    }

    pub(crate) fn count(&mut self, counters: &Counters) {
        self.promotions += counters.promotions;
        self.evictions_nvme += counters.evictions_nvme;
        self.retired += counters.chunks_retired;
        self.replaced += counters.windows_replaced;
        self.adopted += counters.windows_adopted;
        self.intakes += counters.intakes;
        self.copies += counters.copies;
        self.expired += counters.leases_expired;
        self.revoked += counters.leases_revoked;
        self.throttled += counters.throttled;
        self.scrubbed += counters.scrub_blocks;
        self.scrub_damaged += counters.scrub_damaged;
        self.promotions_hbm += counters.promotions_hbm;
        self.demotions_hbm += counters.demotions_hbm;
        self.evictions_hbm += counters.evictions_hbm;
    }
}
