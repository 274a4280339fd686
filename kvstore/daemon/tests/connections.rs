//! Peers of the TCP listeners that connect and say nothing: they must not take the daemon's descriptors, nor keep others out
//! for long.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::{PATIENCE, Running, folder, http};
use terrace_client::{Session, Target};

const MOST: usize = 4;
/// What the daemon waits for the first words of a client, and some.
const GREETED_WITHIN: Duration = Duration::from_secs(20);

fn count(daemon: &Running, name: &str, listener: &str) -> u64 {
    let page = http(&daemon.metrics, "/metrics");
    let start = format!("{name}{{listener=\"{listener}\"}} ");
    page.lines().find_map(|line| line.strip_prefix(&start)).unwrap().trim().parse().unwrap()
}

/// Connects until the daemon has let in so many.
fn fill(daemon: &Running, address: &str, listener: &str, count_of: usize) -> Vec<TcpStream> {
    let silent: Vec<_> = (0..count_of).map(|_| TcpStream::connect(address).unwrap()).collect();
    let began = Instant::now();
    let expected = count_of as u64 + u64::from(listener == "metrics");
    while count(daemon, "terrace_connections", listener) < expected {
        assert!(began.elapsed() < PATIENCE, "they are not let in");
        std::thread::sleep(Duration::from_millis(2));
    }
    silent
}

/// Waits until the daemon closes it; false if it does not in time.
fn is_closed(mut stream: &TcpStream, within: Duration) -> bool {
    stream.set_read_timeout(Some(within)).unwrap();
    let mut bytes = [0; 64];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return true,
            // What a server of HTTP/2 says first.
            Ok(_) => {}
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {
                return false;
            }
            Err(_) => return true,
        }
    }
}

/// All connections of gRPC are taken by peers that say nothing, or half a greeting. Whoever comes then is refused at once,
/// and counted, instead of waiting; the silent ones are given up soon, and clients served again. A client that is quiet
/// for as long stays.
#[tokio::test(flavor = "multi_thread")]
async fn silent_peers_are_given_up() {
    let folder = folder();
    let daemon = Running::start(folder.path(), &format!("[limits]\nconnections = {MOST}\n"));
    let address = daemon.grpc.strip_prefix("http://").unwrap().to_owned();
    let target = Target { grpc: Some(daemon.grpc.clone()), ..Target::default() };
    let quiet = Session::connect(&target).await.unwrap();
    let silent = fill(&daemon, &address, "grpc", MOST - 1);
    (&silent[0]).write_all(b"PRI * HTTP").unwrap();
    let began = Instant::now();
    let refused = TcpStream::connect(&address).unwrap();
    assert!(is_closed(&refused, Duration::from_secs(5)), "one more is let in");
    assert!(Session::connect(&target).await.is_err(), "a client is served beyond the limit");
    assert!(count(&daemon, "terrace_connections_refused_total", "grpc") >= 2);
    for stream in &silent {
        assert!(
            is_closed(stream, GREETED_WITHIN.saturating_sub(began.elapsed())),
            "it may go on saying nothing"
        );
    }
    assert_eq!(count(&daemon, "terrace_connections_silent_total", "grpc"), MOST as u64 - 1);
    let served = Session::connect(&target).await.expect("there is room again");
    // Its pings are answered by its runtime.
    assert!(quiet.open_space(&common::manifest(0)).await.is_ok(), "a client that is there was given up");
    drop((quiet, served));
    daemon.assert_quiet().await;
}

/// The same for `/metrics`: too many are refused, gRPC does not notice, and one that goes makes room.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_metrics_listener_is_full_alone() {
    let folder = folder();
    let daemon = Running::start(folder.path(), &format!("[limits]\nconnections = {MOST}\n"));
    // The page is asked for beside them.
    let mut silent = fill(&daemon, &daemon.metrics, "metrics", MOST - 1);
    silent.push(TcpStream::connect(&daemon.metrics).unwrap());
    let refused = TcpStream::connect(&daemon.metrics).unwrap();
    assert!(is_closed(&refused, Duration::from_secs(5)), "one more is let in");
    assert_eq!(daemon.info().await.sessions, 0, "gRPC is served");
    drop(silent);
    let began = Instant::now();
    loop {
        let mut stream = TcpStream::connect(&daemon.metrics).unwrap();
        let mut answer = String::new();
        let asked = stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n");
        if asked.is_ok() && stream.read_to_string(&mut answer).is_ok() && answer.ends_with("ok\n") {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "there is no room again");
    }
    assert!(count(&daemon, "terrace_connections_refused_total", "metrics") >= 1);
}
