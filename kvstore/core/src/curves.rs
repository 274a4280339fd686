//! Miss-ratio curves: what a tier would serve at other sizes, estimated while it works.

use crate::core::Core;
use crate::ids::TenantId;
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
    /// Seconds that it would have saved since start.
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
    /// Blocks asked for since start; of the sampled ones it is an estimate.
    pub references: u64,
    /// By size, smallest first.
    pub points: Vec<CurvePoint>,
}

impl Core {
    /// The curves that are being estimated. A node that estimates none has none.
    pub fn curves(&self) -> Vec<CurveView> {
        Vec::new()
    }
}
