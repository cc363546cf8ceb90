package gemma.demo

import android.content.Context
import android.net.ConnectivityManager
import android.net.NetworkCapabilities
import gemma.core.DownloadException
import java.io.IOException
import java.net.HttpURLConnection
import java.net.URL

/** The phone's networks. */
internal class Networks(context: Context) {
    private val manager = context.getSystemService(Context.CONNECTIVITY_SERVICE) as ConnectivityManager

    /**
     * A connection that stays on the network in use: if that ends, so does the connection, and none moves from Wi-Fi to
     * mobile data. Throws DownloadException on a metered network unless that is allowed.
     */
    fun connect(url: URL, isMeteredAllowed: Boolean): HttpURLConnection {
        val network = manager.activeNetwork ?: throw IOException("the phone has no network")
        val capabilities = manager.getNetworkCapabilities(network)
        val isUnmetered = capabilities?.hasCapability(NetworkCapabilities.NET_CAPABILITY_NOT_METERED) == true
        if (!isUnmetered && !isMeteredAllowed) {
            throw DownloadException("The phone is on mobile data or another metered network; use Wi-Fi, or allow mobile data for this download.")
        }
        return network.openConnection(url) as HttpURLConnection
    }
}
