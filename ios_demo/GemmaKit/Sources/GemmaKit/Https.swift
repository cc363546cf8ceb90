import Foundation

#if canImport(FoundationNetworking)
import FoundationNetworking
#endif
#if os(iOS) || GEMMA_STUBS
import Darwin
#endif

/// A server's answer, whose body follows.
struct HTTPAnswer: Sendable {
    let status: Int
    let host: String
    let commit: String?  // told by the hub, which may have redirected the request
    let bytes: Int?  // nil if not told
    private let headers: [String: String]

    init(_ response: HTTPURLResponse, commit: String?) {
        status = response.statusCode
        host = response.url?.host ?? ""
        headers = lowercased(response)
        bytes = headers["content-length"].flatMap { Int($0) }
        self.commit = commit ?? headers["x-repo-commit"]
    }

    /// A strong one, which names these very bytes; nil if there is none.
    var etag: String? { header("ETag").flatMap { $0.hasPrefix("\"") ? $0 : nil } }

    func header(_ name: String) -> String? { headers[name.lowercased()] }
}

/// What takes an answer: its head, then its body piece by piece. An error ends the request.
protocol Receiver: AnyObject, Sendable {
    func begin(_ answer: HTTPAnswer) throws
    func take(_ data: Data) throws
}

/// Requests files over HTTPS. Redirects may lead to other hosts, but never to plain HTTP. Requests name the app and tell
/// nothing else: no account, no cookie, no language, no model of the phone.
struct Https: Sendable {
    let isMeteredAllowed: Bool
    let timeout: TimeInterval
    let plainHosts: Set<String>  // hosts for which http is allowed

    /// Throws CutError if the connection fails, what the receiver throws, a download error if a redirect is refused.
    func get(_ url: URL, _ headers: [String: String], _ receiver: any Receiver) async throws {
        try check(url, from: nil)
        var request = URLRequest(url: url, cachePolicy: .reloadIgnoringLocalCacheData, timeoutInterval: timeout)
        // Ranges and sizes count the file's own bytes, so it must not be compressed.
        let about = ["User-Agent": "gemma-demo", "Accept-Encoding": "identity", "Accept-Language": "*"]
        for (name, value) in about.merging(headers, uniquingKeysWith: { $1 }) {
            request.setValue(value, forHTTPHeaderField: name)
        }
        let exchange = Exchange(self, request, receiver)
        let queue = OperationQueue()
        queue.maxConcurrentOperationCount = 1
        let session = URLSession(configuration: configuration(), delegate: exchange, delegateQueue: queue)
        defer { session.finishTasksAndInvalidate() }
        let task = session.dataTask(with: request)
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { exchange.start(task, $0) }
        } onCancel: {
            task.cancel()
        }
    }

    /// Throws a download error unless a URL is encrypted.
    func check(_ url: URL?, from: String?) throws {
        let (scheme, host) = (url?.scheme ?? "", url?.host ?? "")
        if scheme == "https" || (scheme == "http" && plainHosts.contains(host)) { return }
        throw GemmaError.download(
            "\(from ?? host) leads to \(scheme)://\(host), which is not encrypted; nothing was downloaded from there")
    }

    private func configuration() -> URLSessionConfiguration {
        let configuration = URLSessionConfiguration.ephemeral
        configuration.urlCache = nil
        configuration.httpCookieStorage = nil
        configuration.httpShouldSetCookies = false
        configuration.timeoutIntervalForRequest = timeout
        configuration.allowsCellularAccess = isMeteredAllowed
        #if os(iOS) || GEMMA_STUBS
        configuration.allowsExpensiveNetworkAccess = isMeteredAllowed
        configuration.allowsConstrainedNetworkAccess = isMeteredAllowed
        #endif
        return configuration
    }
}

/// A connection that ended before the file did; the download goes on with another one.
struct CutError: Error {
    let reason: String
}

/// One request. Its methods are called one after the other, on the session's queue.
private final class Exchange: NSObject, URLSessionDataDelegate, @unchecked Sendable {
    private let https: Https
    private let request: URLRequest
    private let receiver: any Receiver
    private var continuation: CheckedContinuation<Void, any Error>?
    private var failure: (any Error)?
    private var commit: String?
    private var redirects = 0

    init(_ https: Https, _ request: URLRequest, _ receiver: any Receiver) {
        self.https = https
        self.request = request
        self.receiver = receiver
    }

    func start(_ task: URLSessionDataTask, _ continuation: CheckedContinuation<Void, any Error>) {
        self.continuation = continuation
        task.resume()
    }

    func urlSession(
        _ session: URLSession, task: URLSessionTask, willPerformHTTPRedirection response: HTTPURLResponse,
        newRequest: URLRequest, completionHandler: @escaping (URLRequest?) -> Void
    ) {
        let host = response.url?.host ?? ""
        commit = commit ?? lowercased(response)["x-repo-commit"]
        redirects += 1
        do {
            guard redirects <= 10 else {
                throw GemmaError.download("\(host) redirects more than 10 times; try again later")
            }
            try https.check(newRequest.url, from: host)
            var next = request
            next.url = newRequest.url
            completionHandler(next)
        } catch {
            failure = error
            completionHandler(nil)  // the redirect itself becomes the answer, which is refused below
        }
    }

    func urlSession(
        _ session: URLSession, dataTask: URLSessionDataTask, didReceive response: URLResponse,
        completionHandler: @escaping (URLSession.ResponseDisposition) -> Void
    ) {
        do {
            guard failure == nil, let answer = response as? HTTPURLResponse else { return completionHandler(.cancel) }
            try receiver.begin(HTTPAnswer(answer, commit: commit))
            completionHandler(.allow)
        } catch {
            failure = error
            completionHandler(.cancel)
        }
    }

    func urlSession(_ session: URLSession, dataTask: URLSessionDataTask, didReceive data: Data) {
        guard failure == nil else { return }
        do {
            try receiver.take(data)
        } catch {
            failure = error
            dataTask.cancel()
        }
    }

    func urlSession(_ session: URLSession, task: URLSessionTask, didCompleteWithError error: (any Error)?) {
        let waiting = continuation
        continuation = nil
        if let problem = failure ?? error.map(explained) {
            waiting?.resume(throwing: problem)
        } else {
            waiting?.resume()
        }
    }
}

private func lowercased(_ response: HTTPURLResponse) -> [String: String] {
    var headers: [String: String] = [:]
    for (name, value) in response.allHeaderFields { headers["\(name)".lowercased()] = "\(value)" }
    return headers
}

private func explained(_ error: any Error) -> any Error {
    #if os(iOS) || GEMMA_STUBS
    if (error as? URLError)?.networkUnavailableReason != nil {
        return GemmaError.download(
            "The phone is on mobile data or in Low Data Mode; use Wi-Fi, or allow mobile data for this download.")
    }
    #endif
    return CutError(reason: error.localizedDescription)
}
