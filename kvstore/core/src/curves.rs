//! Miss-ratio curves: what a tier would serve at other sizes, estimated while it works.

use crate::api::Config;
use crate::core::Core;
use crate::evict::narrow;
use crate::ids::{BlockId, TenantId};
use crate::policy::ghost::Step;
use crate::policy::{self, Asked, Curves, Lookup};
use crate::units::ByteCount;

/// A tier that has curves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CurveTier {
    /// Host memory.
    Pinned,
    /// Devices.
    Nvme,
}

/// What one size of a tier would serve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurvePoint {
    /// The size.
    pub capacity: ByteCount,
    /// Share of the tokens asked for that it would serve, 0 to 1.
    pub token_ratio: f64,
    /// Share of the seconds of recomputing them that it would save, 0 to 1.
    pub saved_ratio: f64,
    /// Seconds that it would have saved lately: old requests fade.
    pub saved_seconds: f64,
}

/// The curve of one tier, over all tenants or for one.
#[derive(Clone, Debug, PartialEq)]
pub struct CurveView {
    /// The tier.
    pub tier: CurveTier,
    /// One tenant, or all of them.
    pub tenant: Option<TenantId>,
    /// The tier's size now.
    pub capacity: ByteCount,
    /// Share of the blocks that the estimate looks at, 0 to 1.
    pub sample_rate: f64,
    /// Blocks asked for since start, by all tenants.
    pub references: u64,
    /// By size, smallest first.
    pub points: Vec<CurvePoint>,
}

/// What is estimated for both tiers.
#[derive(Debug)]
pub(crate) struct CurveBooks {
    pinned: Curves,
    nvme: Curves,
    sizes: (u64, u64),
    references: u64,
}

impl CurveBooks {
    pub(crate) fn new(config: &Config) -> Self {
        let slots: u64 = config.device_slots.iter().map(|&slots| u64::from(slots)).sum();
        let (pinned, nvme) = (config.pinned_bytes.get(), slots * config.chunk_bytes.get());
        let (pinned_curves, nvme_curves) = (Curves::new(pinned.max(1)), Curves::new(nvme.max(1)));
        Self { pinned: pinned_curves, nvme: nvme_curves, sizes: (pinned, nvme), references: 0 }
    }

    /// Memory comes and goes; the curve is for what there is.
    pub(crate) fn resize_pinned(&mut self, bytes: u64) {
        if self.sizes.0 != bytes {
            self.sizes.0 = bytes;
            self.pinned.resize(bytes.max(1));
        }
    }

    /// A tenant's request for a prefix of so many blocks, head first. Those that
    /// [`CurveBooks::shift`] leaves out may be missing from `blocks`.
    pub(crate) fn request(
        &mut self,
        tenant: TenantId,
        asked: Asked,
        count: u64,
        blocks: impl Iterator<Item = Lookup> + Clone,
    ) {
        self.references += count;
        self.pinned.request(tenant, asked, blocks.clone());
        if self.sizes.1 > 0 {
            self.nvme.request(tenant, asked, blocks);
        }
    }

    /// A tenant's block is looked at only if so many leading bits of its key are zero.
    pub(crate) fn shift(&self, tenant: TenantId) -> u32 {
        let nvme = if self.sizes.1 > 0 { self.nvme.shift(tenant) } else { u32::MAX };
        self.pinned.shift(tenant).min(nvme)
    }
}

/// What was read again, as the curves take a request.
#[derive(Debug, Default)]
struct Again {
    asked: Asked,
    count: u64,
    lookups: Vec<Lookup>,
}

impl Again {
    /// So many reads of a block, at one distance from the last.
    fn add(&mut self, lookup: Lookup, seconds: f64, reads: u32) {
        self.asked.tokens += f64::from(lookup.tokens) * f64::from(reads);
        self.asked.seconds += seconds * f64::from(reads);
        self.count += u64::from(reads);
        let tokens = lookup.tokens.saturating_mul(reads);
        self.lookups.push(Lookup { tokens, seconds: narrow(seconds * f64::from(reads)), ..lookup });
    }
}

impl Core {
    /// A tenant's blocks were read where they were known to lie, so often since it told last. The first of these reads
    /// comes behind all that was asked for before; between the others lies what was read often in the same time.
    pub(crate) fn read_again(&mut self, tenant: TenantId, blocks: &[BlockId], reads: &[u32]) {
        let (mut first, mut others) = (Again::default(), Again::default());
        for (&block, &reads) in blocks.iter().zip(reads).filter(|&(_, &reads)| reads > 0) {
            let Some(index) = self.find(tenant, block) else { continue };
            let held = self.blocks.at(index);
            let space = self.spaces.at(held.space);
            let seconds = space.compute.cost().seconds(held.depth);
            let (size, tokens) = (space.frame_bytes.get(), space.block_tokens.get());
            let lookup = Lookup { key: Step::key_of(block), size, tokens, seconds: narrow(seconds) };
            first.add(lookup, seconds, 1);
            if reads > 1 {
                others.add(lookup, seconds, reads - 1);
            }
        }
        self.counters.hits += first.count + others.count;
        for Again { asked, count, lookups } in [first, others].into_iter().filter(|again| again.count > 0) {
            self.curves.request(tenant, asked, count, lookups.into_iter());
        }
    }

    /// The curves that are being estimated, over all tenants and for each of the first few.
    pub fn curves(&self) -> Vec<CurveView> {
        let books = &self.curves;
        let tiers = [
            (CurveTier::Pinned, &books.pinned, books.sizes.0),
            (CurveTier::Nvme, &books.nvme, books.sizes.1),
        ];
        let mut views = Vec::new();
        for (tier, curves, size) in tiers.into_iter().filter(|&(_, _, size)| size > 0) {
            let tenants = curves.tenants().map(Some);
            for tenant in std::iter::once(None).chain(tenants) {
                let Some(curve) = curves.find(tenant) else { continue };
                let asked = curve.asked_seconds();
                let point = |point: policy::CurvePoint| CurvePoint {
                    capacity: ByteCount::new(point.size),
                    token_ratio: point.token_hits,
                    saved_ratio: point.second_hits,
                    saved_seconds: point.second_hits * asked,
                };
                views.push(CurveView {
                    tier,
                    tenant,
                    capacity: ByteCount::new(size),
                    sample_rate: curve.sample_rate(),
                    references: books.references,
                    points: curve.points().into_iter().map(point).collect(),
                });
            }
        }
        views
    }
}
