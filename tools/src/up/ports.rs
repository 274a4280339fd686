//! Ports for the processes of one run.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Context, bail};

/// Below the range from which the kernel takes ports of outgoing connections,
/// so that a restarted process finds its port free.
const FIRST: u16 = 20_000;
/// Ports to try.
const COUNT: u16 = 10_000;

/// Checks that the front door's port can be had.
///
/// # Errors
/// When it is in use or not allowed.
pub(crate) fn check_front_door(port: u16) -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    if let Err(error) = listener {
        match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                bail!("port {port} is in use: choose another --port, or stop its user")
            }
            std::io::ErrorKind::PermissionDenied => {
                bail!("port {port} needs privileges: choose a --port of 1024 or more")
            }
            _ => {
                return Err(error)
                    .with_context(|| format!("cannot listen on port {port}; choose another --port"));
            }
        }
    }
    Ok(())
}

/// `N` free ports of the loopback address, tried from a place that depends on
/// this process, so that two runs seldom try the same ones.
///
/// # Errors
/// When there are none.
pub(crate) fn free<const N: usize>() -> anyhow::Result<[SocketAddr; N]> {
    let offset = u16::try_from(std::process::id().wrapping_mul(7) % u32::from(COUNT)).unwrap_or(0);
    // Held until all are found, so that no port is given twice.
    let mut held = Vec::new();
    for step in 0..COUNT {
        if held.len() == N {
            break;
        }
        let port = FIRST + (offset + step) % COUNT;
        held.extend(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map(|listener| (listener, port)));
    }
    let found: Vec<SocketAddr> =
        held.iter().map(|(_, port)| SocketAddr::from((Ipv4Addr::LOCALHOST, *port))).collect();
    found.try_into().ok().context("no free port on 127.0.0.1 between 20000 and 30000")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A port in use must be named in the error, before anything was started.
    #[test]
    fn a_port_in_use_is_refused_by_number() {
        let user = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = user.local_addr().unwrap().port();
        let error = check_front_door(port).unwrap_err().to_string();
        assert!(error.contains(&format!("port {port} is in use")), "{error}");
    }

    /// One port given to two processes would make the second fail: all must differ.
    #[test]
    fn free_ports_differ() {
        let ports = free::<8>().unwrap();
        let distinct: std::collections::BTreeSet<_> = ports.iter().collect();
        assert_eq!(distinct.len(), 8);
    }
}
