//! What a tenant and each of its sessions may hold at a time: leases, bytes that
//! they pin, requests that wait.

use crate::api::Limit;
use crate::core::Core;
use crate::ids::{ChunkId, Memory, SessionId, TenantId};
use crate::state::chunk::{Chunk, ChunkKind};

impl Core {
    /// Bytes that the session may yet lease.
    pub(crate) fn lease_allowance(&self, tenant: TenantId, session: SessionId) -> u64 {
        let limits = &self.config.limits;
        let of_tenant = self.tenants.get(&tenant).map_or(0, |held| held.leased_bytes);
        let of_session = self.sessions.get(&session).map_or(0, |open| open.leased_bytes);
        let left_to_tenant = limits.leased_bytes_per_tenant.get().saturating_sub(of_tenant);
        left_to_tenant.min(limits.leased_bytes_per_session.get().saturating_sub(of_session))
    }

    /// Which limit keeps the session from leasing more bytes.
    fn leased_bytes_limit(&self, session: SessionId) -> Limit {
        let Some(open) = self.sessions.get(&session) else { return Limit::LeasedBytes };
        let limits = &self.config.limits;
        let of_tenant = self.tenants.get(&open.tenant).map_or(0, |held| held.leased_bytes);
        let left_to_tenant = limits.leased_bytes_per_tenant.get().saturating_sub(of_tenant);
        let left = limits.leased_bytes_per_session.get().saturating_sub(open.leased_bytes);
        if left < left_to_tenant { Limit::LeasedBytesOfSession } else { Limit::LeasedBytes }
    }

    /// Why a lease got no frame at all.
    pub(crate) fn no_frame_limit(&self, session: SessionId) -> Limit {
        let tenant = self.sessions.get(&session).map(|open| open.tenant);
        let allowance = tenant.map_or(0, |tenant| self.lease_allowance(tenant, session));
        if self.blocks.len() + 2 > self.config.limits.blocks {
            return Limit::Blocks;
        }
        let is_full = self.chunks.pinned_len() >= self.chunks_max();
        let is_pool = |chunk: &Chunk| chunk.kind == ChunkKind::Pool;
        // Then it does not help what a session may lease.
        let is_windows = is_full && !self.chunks.iter_in(Memory::Pinned).any(|(_, chunk)| is_pool(chunk));
        let may_lease = allowance >= self.config.chunk_bytes.get();
        if may_lease && self.create_failed {
            Limit::Memory
        } else if is_windows || (may_lease && is_full) {
            Limit::Pool
        } else {
            self.leased_bytes_limit(session)
        }
    }

    pub(crate) fn charge(&mut self, tenant: TenantId, session: SessionId, bytes: u64) {
        self.tenants.entry(tenant).or_default().leased_bytes += bytes;
        if let Some(open) = self.sessions.get_mut(&session) {
            open.leased_bytes += bytes;
        }
    }

    pub(crate) fn uncharge(&mut self, tenant: TenantId, session: SessionId, bytes: u64) {
        self.uncharge_tenant(tenant, bytes);
        if let Some(open) = self.sessions.get_mut(&session) {
            assert!(open.leased_bytes >= bytes, "a session gives back what it was charged");
            open.leased_bytes -= bytes;
        }
    }

    pub(crate) fn uncharge_tenant(&mut self, tenant: TenantId, bytes: u64) {
        let held = self.tenants.entry(tenant).or_default();
        assert!(held.leased_bytes >= bytes, "a tenant gives back what it was charged");
        held.leased_bytes -= bytes;
    }

    /// A window is its session's no more. Its tenant stays charged until the memory is back.
    pub(crate) fn window_left(&mut self, owner: SessionId, window: ChunkId) {
        let bytes = self.config.chunk_bytes.get();
        self.ahead.windows.remove(&window);
        if let Some(open) = self.sessions.get_mut(&owner)
            && open.windows.remove(&window)
        {
            assert!(open.leased_bytes >= bytes, "a session is charged for its windows");
            open.leased_bytes -= bytes;
        }
    }

    /// May the session hold another lease?
    pub(crate) fn may_hold(&self, session: SessionId, tenant: TenantId) -> Result<(), Limit> {
        let limits = &self.config.limits;
        let of_session = self.sessions.get(&session).map_or(usize::MAX, |open| open.leases.len());
        let of_tenant = self.tenants.get(&tenant).map_or(0, |held| held.leases);
        if of_session >= limits.leases_per_session as usize {
            return Err(Limit::Leases);
        }
        if of_tenant >= limits.leases_per_tenant { Err(Limit::LeasesOfTenant) } else { Ok(()) }
    }

    /// May another request of the session wait?
    pub(crate) fn may_wait(&self, session: SessionId) -> Result<(), Limit> {
        let limits = &self.config.limits;
        let Some(open) = self.sessions.get(&session) else { return Err(Limit::Sessions) };
        if open.waits.len() >= limits.requests_waiting_per_session as usize {
            return Err(Limit::RequestsWaitingOfSession);
        }
        let of_tenant = self.tenants.get(&open.tenant).map_or(0, |held| held.waits);
        if of_tenant >= limits.requests_waiting_per_tenant {
            return Err(Limit::RequestsWaitingOfTenant);
        }
        if self.waits.len() >= limits.requests_waiting as usize {
            return Err(Limit::RequestsWaiting);
        }
        Ok(())
    }
}
