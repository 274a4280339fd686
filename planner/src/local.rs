//! Runs workers as processes of this machine.
//!
//! They share the planner's process group and die with it. Each worker picks
//! its own port and reports it through the daemon's signals.

use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use crate::process::{self, Ask};
use crate::size::Role;

/// Starts and stops workers somewhere. The planner calls it from one thread and
/// never waits in it.
pub trait Connector {
    /// Starts the worker `name`.
    ///
    /// # Errors
    /// When it cannot be started; it then counts as exited.
    fn start(&mut self, role: Role, name: &str) -> Result<(), StartError>;
    /// Asks a worker to drain and exit. Unknown names are ignored.
    fn stop(&mut self, name: &str, ask: Ask);
    /// Workers that are gone since the last call, each once.
    fn exited(&mut self) -> Vec<Exit>;
}

/// A worker that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Which.
    pub name: String,
    /// How it ended, with the place to look at.
    pub how: String,
}

/// Why a worker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The log file cannot be opened.
    #[error("cannot open the log file {path}: {source}; is the directory writable?")]
    Log {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The program cannot be run.
    #[error("cannot run {program}: {source}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// What every worker is started with.
#[derive(Clone, Debug)]
pub struct WorkerSettings {
    /// The `terrace-worker` program.
    pub program: PathBuf,
    /// Model file; none lets the worker choose.
    pub model: Option<PathBuf>,
    /// The daemon's gRPC address.
    pub grpc: String,
    /// The daemon's lane socket.
    pub socket: Option<PathBuf>,
    /// Tenant to act for.
    pub tenant: Option<String>,
    /// Its secret.
    pub token: Option<String>,
    /// Threads of one worker; none lets it choose.
    pub threads: Option<u32>,
    /// Requests that one worker takes at once; none lets it choose.
    pub requests: Option<u32>,
    /// Where workers listen; port 0 lets each choose.
    pub listen: SocketAddr,
    /// Directory for one log file a worker; none sends logs to our stderr.
    pub log_dir: Option<PathBuf>,
}

/// Workers as child processes.
#[derive(Debug)]
pub struct LocalProcesses {
    settings: WorkerSettings,
    children: Vec<(String, Child)>,
}

impl LocalProcesses {
    /// Runs nothing yet.
    pub fn new(settings: WorkerSettings) -> Self {
        Self { settings, children: Vec::new() }
    }

    fn command(&self, role: Role, name: &str) -> Command {
        let settings = &self.settings;
        let mut command = process::guarded(&settings.program);
        command.arg(role.name()).args(["--name", name, "--grpc", &settings.grpc]);
        command.arg("--listen").arg(settings.listen.to_string());
        command.arg("--metrics-listen").arg(settings.listen.to_string());
        let paths = [("--model", &settings.model), ("--socket", &settings.socket)];
        for (flag, path) in paths {
            if let Some(path) = path {
                command.arg(flag).arg(path);
            }
        }
        if let Some(tenant) = &settings.tenant {
            command.args(["--tenant", tenant]);
        }
        // Command lines can be read by every user of the machine.
        if let Some(token) = &settings.token {
            command.env("TERRACE_TOKEN", token);
        }
        for (flag, number) in [("--threads", settings.threads), ("--requests", settings.requests)] {
            if let Some(number) = number {
                command.arg(flag).arg(number.to_string());
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn log_path(&self, name: &str) -> Option<PathBuf> {
        self.settings.log_dir.as_ref().map(|dir| dir.join(format!("{name}.log")))
    }
}

impl Connector for LocalProcesses {
    fn start(&mut self, role: Role, name: &str) -> Result<(), StartError> {
        assert!(self.children.iter().all(|(running, _)| running != name), "{name} runs already");
        let mut command = self.command(role, name);
        if let Some(path) = self.log_path(name) {
            command.env("NO_COLOR", "1");
            let file = OpenOptions::new().create(true).append(true).open(&path);
            command.stderr(file.map_err(|source| StartError::Log { path, source })?);
        }
        let child = command
            .spawn()
            .map_err(|source| StartError::Spawn { program: self.settings.program.clone(), source })?;
        self.children.push((name.to_owned(), child));
        Ok(())
    }

    fn stop(&mut self, name: &str, ask: Ask) {
        if let Some((_, child)) = self.children.iter().find(|(running, _)| running == name) {
            process::signal(child.id(), ask);
        }
    }

    fn exited(&mut self) -> Vec<Exit> {
        let mut exits = Vec::new();
        let mut index = 0;
        while index < self.children.len() {
            let how = match self.children[index].1.try_wait() {
                Ok(None) => {
                    index += 1;
                    continue;
                }
                Ok(Some(status)) => describe(status),
                Err(error) => format!("cannot be waited for: {error}"),
            };
            let (name, child) = self.children.swap_remove(index);
            let place = self.log_path(&name).map(|path| format!("; see {}", path.display()));
            let how = format!("pid {} {how}{}", child.id(), place.unwrap_or_default());
            exits.push(Exit { name, how });
        }
        exits
    }
}

/// How a process ended, as a clause.
pub fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(0), _) => "ended".to_owned(),
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(9)) => "was killed (SIGKILL; the kernel does this too when memory runs out)".to_owned(),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended in an unknown way".to_owned(),
    }
}
