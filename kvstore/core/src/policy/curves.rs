//! One curve over all tenants of a tier and one for each of the first few.

use std::collections::BTreeMap;

use crate::ids::TenantId;
use crate::policy::curve::{Asked, Curve, CurvePoint, Lookup};

/// Sampled blocks of the curve over all (670 KB), and of a tenant's (170 KB).
const ENTRIES_ALL: u32 = 8192;
const ENTRIES_TENANT: u32 = 2048;
/// Tenants with a curve of their own: 11 MB at most. Later ones count in the curve over all only.
const TENANTS_MAX: usize = 64;

/// The curves of one tier.
#[derive(Clone, Debug)]
pub struct Curves {
    size: u64,
    all: Curve,
    tenants: BTreeMap<TenantId, Curve>,
}

impl Curves {
    /// For a tier of this size, in the unit of [`Lookup::size`].
    pub fn new(size: u64) -> Self {
        Self { size, all: Curve::new(size, ENTRIES_ALL), tenants: BTreeMap::new() }
    }

    /// The tier has this size from now on: counts start anew.
    pub fn resize(&mut self, size: u64) {
        self.size = size;
        self.all.resize(size);
        self.tenants.values_mut().for_each(|curve| curve.resize(size));
    }

    /// A tenant's request for a prefix: what all of it asks for, and its blocks, head first, of which those
    /// that [`Curves::shift`] leaves out may be missing.
    pub fn request(&mut self, tenant: TenantId, asked: Asked, blocks: impl Iterator<Item = Lookup> + Clone) {
        self.all.request(asked, blocks.clone());
        if self.tenants.len() < TENANTS_MAX || self.tenants.contains_key(&tenant) {
            let size = self.size;
            self.tenants
                .entry(tenant)
                .or_insert_with(|| Curve::new(size, ENTRIES_TENANT))
                .request(asked, blocks);
        }
    }

    /// A tenant's block is looked at only if so many leading bits of its key are zero.
    pub(crate) fn shift(&self, tenant: TenantId) -> u32 {
        let own = match self.tenants.get(&tenant) {
            Some(curve) => curve.shift(),
            None if self.tenants.len() < TENANTS_MAX => 0,
            None => u32::MAX,
        };
        own.min(self.all.shift())
    }

    /// The curve of a tenant, or over all.
    pub(crate) fn find(&self, tenant: Option<TenantId>) -> Option<&Curve> {
        match tenant {
            None => Some(&self.all),
            Some(tenant) => self.tenants.get(&tenant),
        }
    }

    /// The curve over all tenants.
    pub fn all(&self) -> Vec<CurvePoint> {
        self.all.points()
    }

    /// What a tenant would get if it had the tier alone; `None` if it has no curve.
    pub fn tenant(&self, tenant: TenantId) -> Option<Vec<CurvePoint>> {
        self.tenants.get(&tenant).map(Curve::points)
    }

    /// Tenants that have a curve, in order.
    pub fn tenants(&self) -> impl Iterator<Item = TenantId> + '_ {
        self.tenants.keys().copied()
    }
}
