//! The file as it is written. Keys only; the meaning is next door.

use std::path::PathBuf;

use serde::Deserialize;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) data_dir: PathBuf,
    pub(super) pinned_bytes: Option<String>,
    pub(super) chunk_bytes: Option<String>,
    #[serde(default)]
    pub(super) device: Vec<DeviceFile>,
    #[serde(default)]
    pub(super) hbm: Vec<HbmFile>,
    pub(super) grpc_listen: Option<String>,
    pub(super) lane_socket: Option<PathBuf>,
    pub(super) lane_admits: Option<String>,
    pub(super) metrics_listen: Option<String>,
    pub(super) persist_delay_ms: Option<u64>,
    pub(super) policy: Option<String>,
    pub(super) admission: Option<String>,
    pub(super) write_bytes_per_day: Option<String>,
    pub(super) scrub_bytes_per_second: Option<String>,
    pub(super) window_idle_ms: Option<u64>,
    pub(super) window_recall_max_ms: Option<u64>,
    pub(super) io_backend: Option<String>,
    pub(super) log: Option<String>,
    #[serde(default)]
    pub(super) tenant: Vec<TenantFile>,
    #[serde(default)]
    pub(super) limits: LimitsFile,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeviceFile {
    pub(super) path: PathBuf,
    pub(super) bytes: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HbmFile {
    pub(super) device: String,
    pub(super) bytes: String,
    pub(super) bytes_min: Option<String>,
    pub(super) gds: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TenantFile {
    pub(super) name: String,
    pub(super) token: Option<String>,
    pub(super) windows: Option<String>,
}

impl std::fmt::Debug for TenantFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TenantFile").field("name", &self.name).finish_non_exhaustive()
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LimitsFile {
    pub(super) blocks: Option<u64>,
    pub(super) spaces: Option<u64>,
    pub(super) sessions: Option<u64>,
    pub(super) leases_per_session: Option<u64>,
    pub(super) leases_per_tenant: Option<u64>,
    pub(super) blocks_per_request: Option<u64>,
    pub(super) leased_bytes_per_tenant: Option<String>,
    pub(super) leased_bytes_per_session: Option<String>,
    pub(super) lease_hold_max_ms: Option<u64>,
    pub(super) lease_ttl_max_ms: Option<u64>,
    pub(super) lease_ttl_default_ms: Option<u64>,
    pub(super) requests_waiting: Option<u64>,
    pub(super) requests_waiting_per_session: Option<u64>,
    pub(super) requests_waiting_per_tenant: Option<u64>,
    pub(super) reads_in_flight: Option<u64>,
    pub(super) writes_in_flight: Option<u64>,
    pub(super) replies_remembered: Option<u64>,
    pub(super) retained_percent: Option<u64>,
    pub(super) connections: Option<u64>,
    pub(super) lane_connections: Option<u64>,
    pub(super) requests_in_flight: Option<u64>,
    pub(super) spaces_per_session: Option<u64>,
    pub(super) streams: Option<u64>,
    pub(super) stream_idle_ms: Option<u64>,
    pub(super) events_per_tenant: Option<u64>,
    pub(super) wait_max_ms: Option<u64>,
}
