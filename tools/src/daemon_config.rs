//! The configuration file that a daemon is started with.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context;

/// What we choose; everything else stays at the daemon's defaults.
pub(crate) struct DaemonConfig<'a> {
    /// Where its state lives.
    pub(crate) data_dir: &'a Path,
    /// Lane socket.
    pub(crate) socket: &'a Path,
    /// gRPC.
    pub(crate) grpc: SocketAddr,
    /// `/metrics` and `/healthz`.
    pub(crate) metrics: SocketAddr,
    /// Size of the pool, or `auto`.
    pub(crate) pinned_bytes: &'a str,
    /// Size of the data file, or `auto`.
    pub(crate) nvme_bytes: &'a str,
}

impl DaemonConfig<'_> {
    /// Writes the file.
    ///
    /// # Errors
    /// When a path is not UTF-8, or the file cannot be written.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let mut config = toml::Table::from_iter([
            ("data_dir".to_owned(), text(self.data_dir)?),
            ("pinned_bytes".to_owned(), self.pinned_bytes.to_owned().into()),
            ("grpc_listen".to_owned(), self.grpc.to_string().into()),
            ("lane_socket".to_owned(), text(self.socket)?),
            ("metrics_listen".to_owned(), self.metrics.to_string().into()),
        ]);
        if self.nvme_bytes != "auto" {
            let device = toml::Table::from_iter([
                ("path".to_owned(), text(&self.data_dir.join("nvme0.dat"))?),
                ("bytes".to_owned(), self.nvme_bytes.to_owned().into()),
            ]);
            config.insert("device".to_owned(), vec![device].into());
        }
        let text = format!("# Written by `terrace` at each start.\n{}", toml::to_string(&config)?);
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

fn text(path: &Path) -> anyhow::Result<toml::Value> {
    let text = path
        .to_str()
        .with_context(|| format!("{} is not UTF-8: choose another directory", path.display()))?;
    Ok(text.into())
}
