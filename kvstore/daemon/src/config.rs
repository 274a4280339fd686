//! The configuration file, and what follows from it on this machine.
//!
//! Promises: an unknown key is an error; every error names the key and says what
//! is allowed; the result has a value for everything. The table of keys is in
//! `docs/user-guide.md`.

mod file;
mod hbm;
pub(crate) mod size;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use terrace_core::{Admission, ByteCount, GIB, Limits, MIB, Micros, Policy};
use terrace_lane::Admits;
use terrace_media::Backend;

use file::{File, LimitsFile};
pub use hbm::{HbmDevice, UseGds};

/// Most devices.
const DEVICES_MAX: usize = 64;
/// Most tenants.
const TENANTS_MAX: usize = 4096;
/// Longest tenant name and token, in bytes.
pub(crate) const NAME_BYTES_MAX: usize = 128;
/// Pool size that `auto` does not exceed.
const PINNED_AUTO_MAX: ByteCount = ByteCount::new(16 * GIB);
/// Bytes that any device may be written in a day.
const WRITE_BYTES_PER_DAY_MIN: u64 = 1024 * GIB;
/// Size of the default device where the disk has room for twice that.
const DEVICE_AUTO_MAX: u64 = 4 * GIB;
/// At this rate 345 GB are read again in a day.
const SCRUB_DEFAULT: &str = "4MiB";

/// Settings of one daemon, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Everything that survives lives here.
    pub data_dir: PathBuf,
    /// Most memory in chunks.
    pub pinned_bytes: ByteCount,
    /// Size of a chunk, and of a slot of a device.
    pub chunk_bytes: ByteCount,
    /// The Nvme tier.
    pub devices: Vec<Device>,
    /// The Hbm tier, in the order of the devices' numbers.
    pub hbm: Vec<HbmDevice>,
    /// gRPC listener; loopback.
    pub grpc_listen: SocketAddr,
    /// Unix socket for processes of this machine.
    pub lane_socket: PathBuf,
    /// Who may connect to it.
    pub lane_admits: Admits,
    /// `/metrics` and `/healthz`; loopback.
    pub metrics_listen: SocketAddr,
    /// Longest time that a sealed block waits for its copy in Nvme.
    pub persist_delay: Micros,
    /// What each tier evicts first.
    pub policy: Policy,
    /// Which sealed blocks are copied to the devices.
    pub admission: Admission,
    /// A window without a write for this long is recalled.
    pub window_idle: Micros,
    /// A recalled window that is not handed back for this long is replaced.
    pub window_recall_max: Micros,
    /// Rate at which copies on devices are read again, once a day at most; 0 is never.
    pub scrub_bytes_per_second: ByteCount,
    /// How devices are driven.
    pub io_backend: Backend,
    /// Filter of `tracing`.
    pub log: String,
    /// Who may open sessions.
    pub tenants: Vec<Tenant>,
    /// Limits of the core.
    pub limits: Limits,
    /// Limits of the shell.
    pub edges: Edges,
    /// What was chosen because of this machine, one sentence each.
    pub notes: Vec<String>,
}

/// One file or raw device.
#[derive(Clone, Debug)]
pub struct Device {
    /// Its path.
    pub path: PathBuf,
    /// Chunk slots.
    pub slots: u32,
}

/// One tenant.
#[derive(Clone)]
pub struct Tenant {
    /// Its name.
    pub name: String,
    /// Its secret; `None` asks for none.
    pub token: Option<String>,
    /// What becomes of windows of its local sessions.
    pub windows: Windows,
}

/// How what a local session seals gets into the daemon's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Windows {
    /// As `Adopt` for processes of the daemon's own user, else as `Isolated`.
    #[default]
    Auto,
    /// Its windows become chunks, without a copy.
    Adopt,
    /// It is copied when it is sealed.
    Isolated,
}

impl std::fmt::Debug for Tenant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = self.token.as_ref().map(|_| "(secret)");
        f.debug_struct("Tenant").field("name", &self.name).field("token", &token).finish()
    }
}

/// Limits of connections and queues.
#[derive(Clone, Debug)]
pub struct Edges {
    /// Connections of gRPC, and as many of `/metrics`.
    pub connections: usize,
    /// Connections of the lane socket.
    pub lane_connections: usize,
    /// Requests of one connection that are being answered.
    pub requests_in_flight: usize,
    /// Spaces that one session may have open.
    pub spaces_per_session: usize,
    /// Read and Write streams, over all sessions; of several tenants one may have half of them.
    pub streams: usize,
    /// Longest time that such a stream stands still.
    pub stream_idle: std::time::Duration,
    /// Events that a tenant's log keeps.
    pub events_per_tenant: usize,
    /// Longest time that a lease waits for promotions.
    pub wait_max: Micros,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration {path}: {source}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is no TOML, or has a key that we do not know.
    #[error("{path}: {detail}", path = path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, key and what was expected.
        detail: String,
    },
    /// A value that is not allowed.
    #[error("configuration key `{key}`: {detail}")]
    Value {
        /// The key.
        key: String,
        /// What is allowed.
        detail: String,
    },
}

fn bad(key: impl Into<String>, detail: impl Into<String>) -> ConfigError {
    ConfigError::Value { key: key.into(), detail: detail.into() }
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
        let file = toml::from_str(&text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            detail: error.to_string().trim_end().to_owned(),
        })?;
        Self::check(file)
    }

    /// Reads and checks a text; errors call it "configuration".
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let file = toml::from_str(text).map_err(|error| ConfigError::Syntax {
            path: PathBuf::from("configuration"),
            detail: error.to_string().trim_end().to_owned(),
        })?;
        Self::check(file)
    }

    fn check(file: File) -> Result<Self, ConfigError> {
        let mut notes = Vec::new();
        if file.data_dir.as_os_str().is_empty() {
            return Err(bad("data_dir", "is empty; name a folder for everything that survives a restart"));
        }
        let chunk_bytes = length("chunk_bytes", file.chunk_bytes.as_deref().unwrap_or("64MiB"))?;
        let mib = chunk_bytes.get() / MIB;
        if !chunk_bytes.get().is_multiple_of(2 * MIB) || !(2..=1024).contains(&mib) {
            return Err(bad("chunk_bytes", "must be a multiple of 2MiB, from 2MiB to 1GiB"));
        }
        let pinned_bytes = pinned(file.pinned_bytes.as_deref().unwrap_or("auto"), chunk_bytes, &mut notes)?;
        let lane_socket = file.lane_socket.unwrap_or_else(|| file.data_dir.join("lane.sock"));
        let limits = limits(&file.limits, pinned_bytes, chunk_bytes)?;
        let devices = devices(&file.data_dir, file.device, chunk_bytes, &mut notes)?;
        let hbm = hbm::devices(file.hbm, chunk_bytes, &mut notes)?;
        let admission = admission(
            file.admission.as_deref().unwrap_or("learned"),
            file.write_bytes_per_day.as_deref(),
            &devices,
            chunk_bytes,
        )?;
        Ok(Self {
            pinned_bytes,
            chunk_bytes,
            devices,
            hbm,
            grpc_listen: loopback("grpc_listen", file.grpc_listen.as_deref().unwrap_or("127.0.0.1:7070"))?,
            lane_socket,
            lane_admits: admits(file.lane_admits.as_deref().unwrap_or("owner"))?,
            metrics_listen: loopback(
                "metrics_listen",
                file.metrics_listen.as_deref().unwrap_or("127.0.0.1:9464"),
            )?,
            persist_delay: millis("persist_delay_ms", file.persist_delay_ms, 1000, 0..=3_600_000)?,
            policy: policy(file.policy.as_deref().unwrap_or("duel"))?,
            admission,
            window_idle: millis("window_idle_ms", file.window_idle_ms, 2000, 10..=3_600_000)?,
            window_recall_max: millis("window_recall_max_ms", file.window_recall_max_ms, 5000, 10..=600_000)?,
            scrub_bytes_per_second: length(
                "scrub_bytes_per_second",
                file.scrub_bytes_per_second.as_deref().unwrap_or(SCRUB_DEFAULT),
            )?,
            io_backend: backend(file.io_backend.as_deref().unwrap_or("auto"))?,
            log: file.log.unwrap_or_else(|| "info".to_owned()),
            tenants: tenants(file.tenant)?,
            edges: edges(&file.limits)?,
            limits,
            notes,
            data_dir: file.data_dir,
        })
    }

    /// The settings as `terraced config check` shows them.
    pub fn summary(&self) -> String {
        let mut lines = vec![
            format!("data_dir         {}", self.data_dir.display()),
            format!("pinned_bytes     {}", size::show(self.pinned_bytes)),
            format!("chunk_bytes      {}", size::show(self.chunk_bytes)),
            format!("grpc_listen      {}", self.grpc_listen),
            format!("lane_socket      {}", self.lane_socket.display()),
            format!("metrics_listen   {}", self.metrics_listen),
            format!("persist_delay_ms {}", self.persist_delay.millis()),
            format!("scrub per second {}", size::show(self.scrub_bytes_per_second)),
        ];
        for device in &self.devices {
            let bytes = ByteCount::new(u64::from(device.slots) * self.chunk_bytes.get());
            lines.push(format!("device           {} {}", device.path.display(), size::show(bytes)));
        }
        for device in &self.hbm {
            lines.push(format!("hbm              {} {}", device.name, size::show(device.bytes)));
        }
        for tenant in &self.tenants {
            let token = if tenant.token.is_some() { "with a token" } else { "without a token" };
            lines.push(format!("tenant           {} {token}", tenant.name));
        }
        lines.join("\n")
    }
}

fn length(key: &str, text: &str) -> Result<ByteCount, ConfigError> {
    size::parse(text).map_err(|detail| bad(key, detail))
}

fn policy(text: &str) -> Result<Policy, ConfigError> {
    match text {
        "duel" => Ok(Policy::Duel),
        "learned" => Ok(Policy::Learned),
        "lru" => Ok(Policy::Lru),
        "s3fifo" => Ok(Policy::S3Fifo),
        "fifo" => Ok(Policy::Fifo),
        other => Err(bad("policy", format!("`{other}`; allowed are duel, learned, lru, s3fifo and fifo"))),
    }
}

/// By default each device may be written as much in a day as it holds, or 1 TiB:
/// what drives are made for.
fn admission(
    text: &str,
    bytes_per_day: Option<&str>,
    devices: &[Device],
    chunk_bytes: ByteCount,
) -> Result<Admission, ConfigError> {
    let bytes_per_day = bytes_per_day.map(|text| length("write_bytes_per_day", text)).transpose()?;
    let endured =
        |device: &Device| (u64::from(device.slots) * chunk_bytes.get()).max(WRITE_BYTES_PER_DAY_MIN);
    let all = ByteCount::new(devices.iter().map(endured).sum());
    match text {
        "learned" => Ok(Admission::Learned { bytes_per_day: Some(bytes_per_day.unwrap_or(all)) }),
        "all" if bytes_per_day.is_none() => Ok(Admission::All),
        "all" => Err(bad("write_bytes_per_day", "needs admission = \"learned\": \"all\" writes every block")),
        other => Err(bad("admission", format!("`{other}`; allowed are learned and all"))),
    }
}

fn millis(
    key: &str,
    value: Option<u64>,
    default: u64,
    allowed: std::ops::RangeInclusive<u64>,
) -> Result<Micros, ConfigError> {
    let value = value.unwrap_or(default);
    if !allowed.contains(&value) {
        return Err(bad(key, format!("{value} ms; allowed are {} to {} ms", allowed.start(), allowed.end())));
    }
    Ok(Micros::from_millis(value))
}

fn count(key: &str, value: Option<u64>, default: u64, max: u64) -> Result<u32, ConfigError> {
    let value = value.unwrap_or(default);
    let allowed = (1..=max).contains(&value);
    u32::try_from(value)
        .ok()
        .filter(|_| allowed)
        .ok_or_else(|| bad(format!("limits.{key}"), format!("{value}; allowed are 1 to {max}")))
}

fn loopback(key: &str, text: &str) -> Result<SocketAddr, ConfigError> {
    let address: SocketAddr = text.parse().map_err(|_| {
        bad(key, format!("`{text}` is no address; write it as 127.0.0.1:7070 (port 0 takes a free one)"))
    })?;
    if !address.ip().is_loopback() {
        return Err(bad(
            key,
            format!(
                "{address} can be reached from other machines, and this Terrace has no TLS to protect it; \
                 use a loopback address (127.0.0.1 or [::1]) and a tunnel"
            ),
        ));
    }
    Ok(address)
}

fn backend(text: &str) -> Result<Backend, ConfigError> {
    match text {
        "auto" => Ok(Backend::Auto),
        "io_uring" => Ok(Backend::IoUring),
        "pread" => Ok(Backend::Pread),
        other => Err(bad("io_backend", format!("`{other}`; allowed are auto, io_uring and pread"))),
    }
}

fn pinned(text: &str, chunk_bytes: ByteCount, notes: &mut Vec<String>) -> Result<ByteCount, ConfigError> {
    let chunk = chunk_bytes.get();
    if text == "auto" {
        let available = terrace_media::memory_available();
        let wanted = (available.get() / 4).min(PINNED_AUTO_MAX.get());
        let bytes = (wanted - wanted % chunk).max(2 * chunk);
        notes.push(format!(
            "pinned_bytes is {}: a quarter of the {} MiB that were available, at most {}",
            size::show(ByteCount::new(bytes)),
            available.get() / MIB,
            size::show(PINNED_AUTO_MAX),
        ));
        return Ok(ByteCount::new(bytes));
    }
    let bytes = length("pinned_bytes", text)?.get();
    if bytes < 2 * chunk {
        return Err(bad(
            "pinned_bytes",
            format!(
                "{text} holds less than two chunks of {}; raise it, or lower `chunk_bytes`",
                size::show(chunk_bytes)
            ),
        ));
    }
    Ok(ByteCount::new(bytes - bytes % chunk))
}

fn devices(
    data_dir: &Path,
    listed: Vec<file::DeviceFile>,
    chunk_bytes: ByteCount,
    notes: &mut Vec<String>,
) -> Result<Vec<Device>, ConfigError> {
    if listed.len() > DEVICES_MAX {
        return Err(bad("device", format!("{} devices; the limit is {DEVICES_MAX}", listed.len())));
    }
    if listed.is_empty() {
        let path = data_dir.join("nvme0.dat");
        let bytes = default_device_bytes(&path, data_dir, notes);
        return Ok(vec![Device { slots: slots("device.bytes", bytes, chunk_bytes)?, path }]);
    }
    let mut devices: Vec<Device> = Vec::with_capacity(listed.len());
    for device in listed {
        if device.path.as_os_str().is_empty() {
            return Err(bad("device.path", "is empty; name a file or a raw block device"));
        }
        if devices.iter().any(|other| other.path == device.path) {
            return Err(bad("device.path", format!("{} is listed twice", device.path.display())));
        }
        let bytes = length("device.bytes", &device.bytes)?;
        devices.push(Device { slots: slots("device.bytes", bytes, chunk_bytes)?, path: device.path });
    }
    Ok(devices)
}

fn slots(key: &str, bytes: ByteCount, chunk_bytes: ByteCount) -> Result<u32, ConfigError> {
    let slots = bytes.get() / chunk_bytes.get();
    u32::try_from(slots).ok().filter(|slots| (1..=1 << 20).contains(slots)).ok_or_else(|| {
        let (least, most) = (size::show(chunk_bytes), size::show(ByteCount::new(chunk_bytes.get() << 20)));
        bad(key, format!("{} bytes; allowed are {least} (one chunk) to {most}", bytes.get()))
    })
}

/// A file that is there keeps its size; a new one takes up to half of what is free.
fn default_device_bytes(path: &Path, data_dir: &Path, notes: &mut Vec<String>) -> ByteCount {
    if let Ok(facts) = std::fs::metadata(path)
        && facts.len() > terrace_core::DATA_START
    {
        return ByteCount::new(facts.len() - terrace_core::DATA_START);
    }
    let existing = data_dir.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
    let free =
        rustix::fs::statvfs(existing).map_or(u64::MAX, |facts| facts.f_bavail.saturating_mul(facts.f_frsize));
    let bytes = (free / 2).min(DEVICE_AUTO_MAX);
    if bytes < DEVICE_AUTO_MAX {
        notes.push(format!(
            "the data file takes {} MiB, half of what is free under {}; `[[device]]` says otherwise",
            bytes / MIB,
            existing.display()
        ));
    }
    ByteCount::new(bytes)
}

fn windows(text: &str) -> Result<Windows, ConfigError> {
    match text {
        "auto" => Ok(Windows::Auto),
        "adopt" => Ok(Windows::Adopt),
        "isolated" => Ok(Windows::Isolated),
        other => Err(bad("tenant.windows", format!("`{other}`; allowed are auto, adopt and isolated"))),
    }
}

fn admits(text: &str) -> Result<Admits, ConfigError> {
    match text {
        "owner" => Ok(Admits::Owner),
        "group" => Ok(Admits::Group),
        "everybody" => Ok(Admits::Everybody),
        other => Err(bad("lane_admits", format!("`{other}`; allowed are owner, group and everybody"))),
    }
}

fn tenants(listed: Vec<file::TenantFile>) -> Result<Vec<Tenant>, ConfigError> {
    if listed.is_empty() {
        return Ok(vec![Tenant { name: "default".to_owned(), token: None, windows: Windows::Auto }]);
    }
    if listed.len() > TENANTS_MAX {
        return Err(bad("tenant", format!("{} tenants; the limit is {TENANTS_MAX}", listed.len())));
    }
    let mut tenants: Vec<Tenant> = Vec::with_capacity(listed.len());
    for tenant in listed {
        if tenant.name.is_empty() || tenant.name.len() > NAME_BYTES_MAX {
            return Err(bad("tenant.name", format!("must have 1 to {NAME_BYTES_MAX} bytes")));
        }
        if tenant.token.as_ref().is_some_and(|token| token.is_empty() || token.len() > NAME_BYTES_MAX) {
            return Err(bad(
                "tenant.token",
                format!("must have 1 to {NAME_BYTES_MAX} bytes, or be left out"),
            ));
        }
        if tenants.iter().any(|other| other.name == tenant.name) {
            return Err(bad("tenant.name", format!("`{}` is listed twice", tenant.name)));
        }
        let windows = windows(tenant.windows.as_deref().unwrap_or("auto"))?;
        tenants.push(Tenant { name: tenant.name, token: tenant.token, windows });
    }
    Ok(tenants)
}

fn limits(file: &LimitsFile, pinned_bytes: ByteCount, chunk_bytes: ByteCount) -> Result<Limits, ConfigError> {
    let leased = match file.leased_bytes_per_tenant.as_deref() {
        // Windows count as whole chunks and what is being filled in them once more: with every chunk a window, some
        // must be left for that.
        None => ByteCount::new(pinned_bytes.get().saturating_add(chunk_bytes.get())),
        Some(text) => length("limits.leased_bytes_per_tenant", text)?,
    };
    let leased_bytes_per_session = match file.leased_bytes_per_session.as_deref() {
        None => leased,
        Some(text) => length("limits.leased_bytes_per_session", text)?,
    };
    let per_request = terrace_proto::BLOCKS_PER_REQUEST_MAX as u64;
    let percent = count("retained_percent", file.retained_percent, 25, 90)?;
    Ok(Limits {
        blocks: count("blocks", file.blocks, 1 << 20, 1 << 28)?,
        spaces: count("spaces", file.spaces, 1024, 1 << 16)?,
        sessions: count("sessions", file.sessions, 1024, 1 << 16)?,
        leases_per_session: count("leases_per_session", file.leases_per_session, 4096, 1 << 20)?,
        leases_per_tenant: count("leases_per_tenant", file.leases_per_tenant, 1 << 16, 1 << 24)?,
        leased_bytes_per_session,
        lease_hold_max: millis(
            "limits.lease_hold_max_ms",
            file.lease_hold_max_ms,
            3_600_000,
            100..=604_800_000,
        )?,
        requests_waiting_per_session: count(
            "requests_waiting_per_session",
            file.requests_waiting_per_session,
            1024,
            1 << 20,
        )?,
        requests_waiting_per_tenant: count(
            "requests_waiting_per_tenant",
            file.requests_waiting_per_tenant,
            2048,
            1 << 20,
        )?,
        blocks_per_request: count("blocks_per_request", file.blocks_per_request, per_request, per_request)?,
        leased_bytes_per_tenant: leased,
        lease_ttl_max: millis("limits.lease_ttl_max_ms", file.lease_ttl_max_ms, 600_000, 100..=86_400_000)?,
        lease_ttl_default: millis(
            "limits.lease_ttl_default_ms",
            file.lease_ttl_default_ms,
            30_000,
            100..=86_400_000,
        )?,
        requests_waiting: count("requests_waiting", file.requests_waiting, 4096, 1 << 20)?,
        reads_in_flight: count("reads_in_flight", file.reads_in_flight, 64, 4096)?,
        writes_in_flight: count("writes_in_flight", file.writes_in_flight, 16, 4096)?,
        replies_remembered: count("replies_remembered", file.replies_remembered, 256, 1 << 16)?,
        retained_percent: percent,
    })
}

fn edges(file: &LimitsFile) -> Result<Edges, ConfigError> {
    let whole = |key: &str, value, default, max| count(key, value, default, max).map(|value| value as usize);
    Ok(Edges {
        connections: whole("connections", file.connections, 1024, 1 << 16)?,
        lane_connections: whole("lane_connections", file.lane_connections, 256, 1 << 16)?,
        requests_in_flight: whole("requests_in_flight", file.requests_in_flight, 256, 1 << 16)?,
        spaces_per_session: whole("spaces_per_session", file.spaces_per_session, 256, 1 << 16)?,
        streams: whole("streams", file.streams, 128, 1 << 16)?,
        stream_idle: std::time::Duration::from_millis(
            millis("limits.stream_idle_ms", file.stream_idle_ms, 30_000, 100..=600_000)?.millis(),
        ),
        events_per_tenant: whole("events_per_tenant", file.events_per_tenant, 1 << 16, 1 << 24)?,
        wait_max: millis("limits.wait_max_ms", file.wait_max_ms, 60_000, 1..=600_000)?,
    })
}

#[cfg(test)]
mod tests;
